"""Keyed dropout as one Triton kernel.

The kernel computes the mask in the forward pass and again in the backward pass, so neither masks
nor intermediate integers are stored in memory. It draws the same 32 bits as ``dropout.draw``.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Final

import torch
from torch import Tensor

HAS_TRITON: Final = find_spec("triton") is not None


def has_kernel(x: Tensor) -> bool:
    """Return whether the kernel supports a tensor."""
    return HAS_TRITON and x.is_cuda


@torch.library.custom_op("finetune::keyed_dropout", mutates_args=())
def keyed_dropout(x: Tensor, keys: Tensor, salt: Tensor, probability: float) -> Tensor:
    """Zero the dropped elements, and divide the others by the probability of being kept.

    Args:
        x: floating, shape [documents, tokens, features] or [vectors, features].
        keys: int32 (32 random bits), shape [documents, tokens with a key] or [vectors]; tokens
            without a key (virtual tokens) precede the others and are kept.
        salt: salt of the layer, int32, zero-dimensional.
        probability: probability of being dropped, at least 0 and below 1.
    """
    from finetune_trainer.engine.packing.dropoutkernel import drop  # Triton is slow to import

    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        drop(x, keys.contiguous(), salt, probability, out)
    return out


@keyed_dropout.register_fake
def _(x: Tensor, keys: Tensor, salt: Tensor, probability: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor) -> None:
    _, keys, salt, ctx.probability = inputs
    ctx.save_for_backward(keys, salt)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    keys, salt = ctx.saved_tensors
    return keyed_dropout(grad, keys, salt, ctx.probability), None, None, None


keyed_dropout.register_autograd(_backward, setup_context=_save)
