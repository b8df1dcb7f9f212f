"""Causal attention within the documents of the row in work, by the best kernel that there is.

On a GPU in half precision all spans go to one kernel for variable lengths (torch's own, which is
FlashAttention or cuDNN). Elsewhere documents of like length are attended together in padded
batches, which torch.compile leaves alone: no two rows would be alike. No mask of the row is ever
built, and no work is done across documents.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from finetune_trainer.engine.rows.layout import Group, RowLayout

_MOST_WIDTH: Final = 256
"""Head width up to which FlashAttention works."""


def attend(
    row: RowLayout, query: Tensor, key: Tensor, value: Tensor, scale: float | None,
    window: int | None,
) -> Tensor:  # fmt: skip
    """Attention of a row.

    Args:
        query: shape [1, heads, tokens, width].
        key: shape [1, key heads, tokens, width]; fewer heads than query for grouped queries.
        value: as key.
        scale: of the scores; None: 1 / √width.
        window: keys that a query sees, itself included; None: all before it.

    Returns:
        The attended values, shape [1, tokens, heads, width].
    """
    query, key, value = as_computed(query, key, value)
    if row.wanted is not None:
        key, value = row.wanted.gather(key), row.wanted.gather(value)
    if has_kernel(query, value):
        return _by_offsets(row, query, key, value, scale, window)
    by = _by_group if row.wanted is None else _by_span
    if query.device.type != "cpu":
        return by(row, query, key, value, scale, window)  # type: ignore[no-any-return]
    # There torch's kernel goes back through 150 tokens 19 times as fast in 32 bits as in 16.
    with torch.autocast("cpu", enabled=False):
        attended: Tensor = by(row, query.float(), key.float(), value.float(), scale, window)
    return attended.to(query.dtype)


def as_computed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In the numbers that autocast has attention computed in, as sdpa does: norms of queries give
    float32."""
    if not torch.is_autocast_enabled(query.device.type):
        return query, key, value
    half = torch.get_autocast_dtype(query.device.type)
    return query.to(half), key.to(half), value.to(half)


def has_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether the kernel for variable lengths takes these tensors."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1]
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= _MOST_WIDTH
        and _is_new_enough(query.device.index)
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_new_enough(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _by_offsets(
    row: RowLayout, query: Tensor, key: Tensor, value: Tensor, scale: float | None,
    window: int | None,
) -> Tensor:  # fmt: skip
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    attended = varlen_attn(
        q, k, v, row.offsets.queries, row.offsets.keys, row.longest, row.longest, scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=key.shape[1] != query.shape[1],
    )  # fmt: skip
    assert isinstance(attended, Tensor)
    return attended[None]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _by_span(
    row: RowLayout, query: Tensor, key: Tensor, value: Tensor, scale: float | None,
    window: int | None,
) -> Tensor:  # fmt: skip
    parts = []
    queries = torch.split(query, [span.queries for span in row.spans], 2)
    keys, values = (torch.split(x, [span.keys for span in row.spans], 2) for x in (key, value))
    for q, k, v in zip(queries, keys, values, strict=True):
        mask = _mask(q.shape[2], k.shape[2], window, q.device)
        parts.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
            )
        )
    return torch.cat(parts, 2).transpose(1, 2)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _by_group(
    row: RowLayout, query: Tensor, key: Tensor, value: Tensor, scale: float | None,
    window: int | None,
) -> Tensor:  # fmt: skip
    heads, tokens = query.shape[1:3]
    attended = query.new_empty(tokens, heads, value.shape[-1])
    groups = row.groups
    single = len(groups) == 1 and groups[0].documents == 1
    for group in groups:
        q, k, v = (query, key, value) if single else (_take(x, group) for x in (query, key, value))
        mask = None
        if window is not None and group.longest > window:
            mask = _mask(group.longest, group.longest, window, query.device)
        part = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale,
            enable_gqa=key.shape[1] != heads,
        ).transpose(1, 2)  # fmt: skip
        if single:
            return part
        flat = part.reshape(group.documents * group.longest, heads, -1)
        attended = attended.index_copy(0, group.back, flat.index_select(0, group.keep))
    return attended[None]


def _take(x: Tensor, group: Group) -> Tensor:
    """[1, heads, tokens, width] → [documents, heads, longest, width]."""
    heads, width = x.shape[1], x.shape[3]
    taken = x[0].index_select(1, group.gather)
    return taken.view(heads, group.documents, group.longest, width).transpose(0, 1)


def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys the last queries of a document see: bool, shape [queries, keys]."""
    last = torch.arange(keys - queries, keys, device=device)
    return sees(last, torch.arange(keys, device=device), window)


def sees(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Which keys queries see, by their positions in a document: bool, shape [queries, keys]."""
    distance = queries[:, None] - keys[None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)
