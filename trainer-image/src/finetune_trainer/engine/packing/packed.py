"""Packed sequences: documents concatenated in one sequence, isolated from each other.

Positions restart at each document, and attention runs document by document (``attention``), by the
micro-batch's layout. Outside of ``layout_context`` the registered attention is transformers' own
``sdpa``, so generation needs no switch.
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
"""Attention under a layout, as ``attention.attend``."""


def install() -> None:
    """Register the attention with transformers, under the name ``ATTENTION``."""
    register(ATTENTION, attend)


def register(name: str, within: Attend) -> None:
    """Register an attention with transformers: ``within`` inside ``layout_context``, ``sdpa``
    outside."""

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
    """Return whether a model's attention was registered by ``register``."""
    return ALL_MASK_ATTENTION_FUNCTIONS.get(model.config._attn_implementation) is _mask


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    if current_layout() is not None:
        return None
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


def _check(module: torch.nn.Module, mask: Tensor | None, keywords: dict[str, Any]) -> None:
    """Refuse arguments that attention of packed sequences would ignore.

    Raises:
        UserError: 'UnsuitableModel'.
    """
    strange = unknown(keywords)
    if mask is not None:
        strange.append("attention_mask")
    if strange:
        raise UserError(
            "UnsuitableModel",
            f"spec.model: a {type(module).__name__} passes {', '.join(strange)} to its attention,"
            " which packed sequences do not support; use another model, or set method.type to"
            " PromptTuning or PrefixTuning, whose samples are padded instead of packed",
        )


# Layers that carry state along the sequence (recurrent, convolutional) would leak from document to
# document, regardless of the attention.
_STATEFUL: Final = ("mamba", "rwkv", "rglru", "lightning", "shortconv", "deltanet", "ssm")
_LAYER_TYPES: Final = {"full_attention", "sliding_attention"}


def _rotary(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Return the rotary embedding settings of a model, of all its layer types."""
    found: list[dict[str, Any]] = []
    module: Any
    for module in model.modules():
        if getattr(module, "rope_type", None):
            settings = module.config.rope_parameters
            found += [settings] if "rope_type" in settings else settings.values()
    return found


def reach(model: PreTrainedModel) -> float:
    """Return the most tokens of a document that may share a micro-batch. Longrope models use other
    rotary frequencies for longer documents; the longest document would set those of all."""
    return min(
        (
            kind["original_max_position_embeddings"]
            for kind in _rotary(model)
            if kind["rope_type"] == "longrope"
        ),
        default=math.inf,
    )


def counts_positions(model: torch.nn.Module) -> bool:
    """Return whether a model must compute its own position ids: some (RoBERTa) count from after the
    padding token's id, not from 0 as micro-batches do."""
    return any(hasattr(module, "create_position_ids_from_input_ids") for module in model.modules())


def can_pad(model: PreTrainedModel) -> bool:
    """Return whether padding a document at its end keeps its outputs. Language models are causal
    and get a mask where there is padding, but some (dynamic RoPE) choose rotary frequencies by the
    longest document of a batch."""
    return not any(kind["rope_type"] == "dynamic" for kind in _rotary(model))


def can_pack(model: PreTrainedModel) -> bool:
    """Return whether positions and attention isolate packed documents of this model, and
    ``attention.attend`` computes the model's own attention (``probe``). Documents of other models
    are padded or unpacked, and run with the model's own kernels."""
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
    if any(kind["rope_type"] == "dynamic" for kind in _rotary(model)):  # depends on the length
        return False
    if counts_positions(model) or "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    found = obstacle(model)
    if found is not None:
        log.info("samples of a %s are not packed: %s", type(model).__name__, found)
    return found is None
