"""Liger's fused kernels (Hsu et al. 2024, arXiv:2410.10989) for norms, feed-forward blocks and
rotary positions: on a GPU, for the language models that Liger supports, if it is installed."""

from __future__ import annotations

import inspect
from importlib.util import find_spec

import torch
from transformers import PreTrainedModel

_OURS = ("cross_entropy", "fused_linear_cross_entropy")
"""Not taken from Liger: ``TokenLoss`` computes logits at supervised positions only."""


def use_liger(model: PreTrainedModel, device: torch.device) -> bool:
    """Patch a model with Liger's kernels, if supported; return whether it was patched.

    The patch also changes the model's classes, and Liger's kernels take no meta tensors. So checks
    that run an empty copy of the model (``has_plain_head``, ``can_pack``) must come before.
    """
    if device.type != "cuda" or find_spec("liger_kernel") is None:
        return False
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model.config.model_type)
    # Some patch functions refuse classes that they do not know; all know language models.
    if apply is None or not model.can_generate():
        return False
    accepted = inspect.signature(apply).parameters
    apply(model=model, **{name: False for name in _OURS if name in accepted})
    return True
