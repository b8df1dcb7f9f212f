"""Documents side by side in one row of tokens, that cannot see each other.

A row is a concatenation of documents. Positions restart at each, and attention runs document by
document: no mask is built and no work is done across documents. Documents of like length are
attended together in one padded batch: padding stands behind the document, where causal attention
never looks.

While a row is in work, ``row_context`` says where its documents lie; outside of it the registered
attention is transformers' own ``sdpa``, so generation needs no switch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION: Final = "finetune_documents"

# Documents whose length is within this factor of the longest of their group share a call: more
# calls cost overhead, fewer cost work on padding. Measured on 2 cores with rows of 2,048 tokens.
_GROUP_RATIO: Final = 0.8


@dataclass(frozen=True)
class Group:
    """Documents that are attended in one call."""

    gather: Tensor
    """Row position of each (document, offset), padded; shape [documents * longest]."""
    keep: Tensor
    """Which of them are no padding; indices into the flattened batch."""
    back: Tensor
    """Row position of each kept one."""
    documents: int
    longest: int


@dataclass(frozen=True)
class RowLayout:
    """Where the documents of a row lie, and what is drawn for each token."""

    groups: tuple[Group, ...]
    keys: Tensor
    """Random key of each token, shape [tokens], values below 2**32; see ``dropout``."""
    lengths: Tensor
    """Tokens of each token's document, shape [tokens]."""


# Of the process, not of the thread: autograd runs the backward pass of a GPU, and with it what
# gradient checkpointing computes again, in a thread of its own.
_current: RowLayout | None = None


def current_row() -> RowLayout | None:
    """Layout of the row in work, or None outside of training and loss evaluation."""
    return _current


@contextmanager
def row_context(layout: RowLayout) -> Iterator[None]:
    """Make a row the one in work, for its forward and backward pass (recomputation included)."""
    global _current
    before, _current = _current, layout
    try:
        yield
    finally:
        _current = before


def group_documents(lengths: list[int], device: torch.device) -> tuple[Group, ...]:
    """Groups of documents of like length, for a row made of documents of these lengths."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    for i in order:
        if groups and lengths[i] >= _GROUP_RATIO * lengths[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return tuple(_group([starts[i] for i in g], [lengths[i] for i in g], device) for g in groups)


def _group(starts: list[int], lengths: list[int], device: torch.device) -> Group:
    longest = max(lengths)
    offsets = torch.arange(longest)
    size = torch.tensor(lengths)[:, None]
    position = torch.tensor(starts)[:, None] + torch.minimum(offsets[None, :], size - 1)
    keep = (offsets[None, :] < size).flatten().nonzero().squeeze(1)
    gather = position.flatten()
    return Group(gather.to(device), keep.to(device), gather[keep].to(device), len(lengths), longest)


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
    """Causal attention within each document of a row.

    Args:
        query: shape [1, heads, tokens, width].
        key: shape [1, key heads, tokens, width]; fewer heads than query for grouped queries.
        value: as key.

    Returns:
        The attended values, shape [1, tokens, heads, width].
    """
    row = _current
    if row is None:
        window: dict[str, Any] = {}
        if sliding_window is not None:
            window["sliding_window"] = sliding_window
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            **window, **kwargs,
        )  # fmt: skip
        return output
    heads, tokens = query.shape[1:3]
    attended = query.new_empty(tokens, heads, value.shape[-1])
    single = len(row.groups) == 1 and row.groups[0].documents == 1
    for group in row.groups:
        q, k, v = (query, key, value) if single else (_take(x, group) for x in (query, key, value))
        mask = None
        if sliding_window is not None and group.longest > sliding_window:
            mask = _window_mask(group.longest, sliding_window, query.device)
        part = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling,
            enable_gqa=key.shape[1] != heads,
        ).transpose(1, 2)  # fmt: skip
        if single:
            return part, None
        flat = part.reshape(group.documents * group.longest, heads, -1)
        attended = attended.index_copy(0, group.back, flat.index_select(0, group.keep))
    return attended[None], None


def _take(x: Tensor, group: Group) -> Tensor:
    """[1, heads, tokens, width] → [documents, heads, longest, width]."""
    heads, width = x.shape[1], x.shape[3]
    taken = x[0].index_select(1, group.gather)
    return taken.view(heads, group.documents, group.longest, width).transpose(0, 1)


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    if _current is not None:
        return None
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


def install() -> None:
    """Register the attention with transformers, under the name ``ATTENTION``."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _document_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, _mask)


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
