"""Documents side by side in one row of tokens, that cannot see each other.

Positions restart at each document, and attention runs document by document (``attention``), as the
row's layout says. Outside of a row the registered attention is transformers' own ``sdpa``, so
generation needs no switch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from finetune_trainer.engine.attention import attend
from finetune_trainer.engine.layout import current_row

ATTENTION: Final = "finetune_documents"


def _document_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: within the documents of the row in work (``attend``),
    or, outside of one, as ``sdpa``."""
    row = current_row()
    if row is not None:
        return attend(row, query, key, value, scaling, sliding_window), None
    window: dict[str, Any] = {}
    if sliding_window is not None:
        window["sliding_window"] = sliding_window
    output: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
        **window, **kwargs,
    )  # fmt: skip
    return output


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    if current_row() is not None:
        return None
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


def install() -> None:
    """Register the attention with transformers, under the name ``ATTENTION``."""
    register(ATTENTION, _document_attention)


def register(name: str, attention: Callable[..., tuple[Tensor, None]]) -> None:
    """Register an attention with transformers that needs no mask of a row."""
    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, _mask)


# Layers that carry state along the row (recurrent, convolutional) would leak from document to
# document whatever the attention does.
_STATEFUL: Final = ("mamba", "rwkv", "rglru", "lightning", "shortconv", "deltanet", "ssm")
_LAYER_TYPES: Final = {"full_attention", "sliding_attention"}


def can_pack(model: PreTrainedModel) -> bool:
    """Whether documents in one row of this model are kept apart by positions and attention.

    Models that transformers does not run by sdpa (soft-capped scores, sinks) are not packed: their
    attention is more than what is registered here. A document of theirs has a row of its own.
    """
    if not getattr(model, "_supports_attention_backend", False):
        return False
    if not getattr(model, "_supports_sdpa", False) or getattr(model, "_is_stateful", False):
        return False
    if set(getattr(model.config, "layer_types", None) or ()) - _LAYER_TYPES:
        return False
    names = {type(module).__name__.lower() for module in model.modules()}
    if any(mark in name for name in names for mark in _STATEFUL):
        return False
    if any(isinstance(module, torch.nn.Conv1d) for module in model.modules()):
        return False
    return "position_ids" in inspect.signature(model.forward).parameters
