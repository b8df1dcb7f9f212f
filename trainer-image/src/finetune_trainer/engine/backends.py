"""Selection of PyTorch's GPU kernels, once per process."""

from __future__ import annotations

import torch


def choose_backends() -> None:
    """Disable cuDNN attention and TF32 matrix products.

    cuDNN builds a graph for each new count and length of documents, which takes tens of
    milliseconds, and packed sequences (and the steps of a generation) rarely repeat one.
    FlashAttention takes any shape. TF32 would round the factors to 10 bits, but
    `training.precision: FP32` means float32. In the other precisions, the only float32 products are
    those that need it: transformers computes rotary angles so, and TF32 would turn position 1,025
    into 1,024.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
