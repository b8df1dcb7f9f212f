"""Fused kernels of Liger (Hsu et al. 2024, arXiv:2410.10989) for norms, feed-forward blocks and
rotary positions: on a GPU, for language models that it knows, where it is installed."""

from __future__ import annotations

import inspect
from importlib.util import find_spec

import torch
from transformers import PreTrainedModel

_OURS = ("cross_entropy", "fused_linear_cross_entropy")
"""What the loss does itself: logits at supervised positions only."""


def use_liger(model: PreTrainedModel, device: torch.device) -> bool:
    """Have a model compute by Liger's kernels, if it can; says whether.

    They are those of its classes from then on, and take no tensors of the meta device: what is
    asked of an empty copy of the model (``has_plain_head``, ``can_pack``) is asked before.
    """
    if device.type != "cuda" or find_spec("liger_kernel") is None:
        return False
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model.config.model_type)
    # Some refuse classes that they do not know, and language models are what all of them know.
    if apply is None or not model.can_generate():
        return False
    accepted = inspect.signature(apply).parameters
    apply(model=model, **{name: False for name in _OURS if name in accepted})
    return True
