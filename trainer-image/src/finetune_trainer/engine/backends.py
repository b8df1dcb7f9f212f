"""Which of PyTorch's kernels a GPU uses where it has several, chosen once in each process."""

from __future__ import annotations

import torch


def choose_backends() -> None:
    """Attention never by cuDNN, and products of 32-bit numbers in 32 bits.

    cuDNN builds a graph for each new number and length of documents, in tens of milliseconds, and
    packed sequences (and the steps of a generation) hardly ever repeat one; FlashAttention takes
    any. TF32 would round the factors to 10 bits: `training.precision: FP32` says 32, and of the
    other precisions just those products are in 32 bits that need them (transformers computes
    rotary angles so: position 1,025 would become 1,024).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
