"""Documents side by side in one row of tokens, that cannot see each other.

Positions restart at each document, and attention runs document by document (``attention``), as the
row's layout says. Outside of a row the registered attention is transformers' own ``sdpa``, so
generation needs no switch.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from finetune_trainer.engine.packing.attention import attend
from finetune_trainer.engine.packing.layout import DocumentLayout, current_layout
from finetune_trainer.engine.packing.probe import obstacle, unknown
from finetune_trainer.failures import UserError

log = logging.getLogger(__name__)

ATTENTION: Final = "finetune_documents"

Attend = Callable[[DocumentLayout, Tensor, Tensor, Tensor, float | None, int | None], Tensor]
"""Attention of a row, as ``attention.attend``."""


def install() -> None:
    """Register the attention with transformers, under the name ``ATTENTION``."""
    register(ATTENTION, attend)


def register(name: str, within: Attend) -> None:
    """Register an attention with transformers: ``within`` in a row, ``sdpa`` outside of one."""

    def attention(
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
        layout = current_layout()
        if layout is not None:
            _check(module, attention_mask, kwargs)
            return within(layout, query, key, value, scaling, sliding_window), None
        window: dict[str, Any] = {}
        if sliding_window is not None:
            window["sliding_window"] = sliding_window
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            **window, **kwargs,
        )  # fmt: skip
        return output

    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, _mask)


def attends_documents(model: PreTrainedModel) -> bool:
    """Whether a model's attention is one that was registered here."""
    return ALL_MASK_ATTENTION_FUNCTIONS.get(model.config._attn_implementation) is _mask


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    if current_layout() is not None:
        return None
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


def _check(module: torch.nn.Module, mask: Tensor | None, keywords: dict[str, Any]) -> None:
    """Refuse what the attention of a row would leave out.

    Raises:
        UserError: 'UnsuitableModel'.
    """
    strange = unknown(keywords)
    if mask is not None:
        strange.append("attention_mask")
    if strange:
        raise UserError(
            "UnsuitableModel",
            f"spec.model: a {type(module).__name__} asks its attention for {', '.join(strange)},"
            " which it cannot have in a packed sequence; give another model, or set method.type to"
            " PromptTuning or PrefixTuning, whose samples are not packed but padded",
        )


# Layers that carry state along the row (recurrent, convolutional) would leak from document to
# document force the attention does.
_STATEFUL: Final = ("mamba", "rwkv", "rglru", "lightning", "shortconv", "deltanet", "ssm")
_LAYER_TYPES: Final = {"full_attention", "sliding_attention"}


def _rotary(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Settings of the rotary positions of a model, of all its kinds of layers."""
    found: list[dict[str, Any]] = []
    module: Any
    for module in model.modules():
        if getattr(module, "rope_type", None):
            settings = module.config.rope_parameters
            found += [settings] if "rope_type" in settings else settings.values()
    return found


def reach(model: PreTrainedModel) -> float:
    """Most tokens of documents that may share a row. Some models have other rotary frequencies for
    longer ones, and the longest of a row would choose them for all."""
    return min(
        (
            kind["original_max_position_embeddings"]
            for kind in _rotary(model)
            if kind["rope_type"] == "longrope"
        ),
        default=math.inf,
    )


def counts_positions(model: torch.nn.Module) -> bool:
    """Whether a model's positions are not those of a row, which begin at 0: some count theirs from
    behind the padding token's, and must be let."""
    return any(hasattr(module, "create_position_ids_from_input_ids") for module in model.modules())


def can_pad(model: PreTrainedModel) -> bool:
    """Whether a document of this model, padded at its end to the length of another, is computed as
    it is alone. Language models look back only, and where there is padding they are given a mask;
    but some choose rotary frequencies by the longest document of a batch."""
    return not any(kind["rope_type"] == "dynamic" for kind in _rotary(model))


def can_pack(model: PreTrainedModel) -> bool:
    """Whether documents in one row of this model are kept apart by positions and attention, and
    each is attended as the model's own attention would (``probe``). A document of others is
    padded, or has a row of its own, and the model's own kernels."""
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
    if any(kind["rope_type"] == "dynamic" for kind in _rotary(model)):  # new ones for any length
        return False
    if counts_positions(model) or "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    found = obstacle(model)
    if found is not None:
        log.info("samples of a %s are not packed: %s", type(model).__name__, found)
    return found is None
