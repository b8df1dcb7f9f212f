"""Causal attention within the documents of the current layout, by the best available kernel.

bf16 and fp16 on a GPU   variable-length FlashAttention over all spans
float32, wider heads     memory-efficient kernel (GPU); documents of similar length are padded and
                         attended in one batch
CPU                      SDPA, with the same padded batches

Memory is never quadratic in the sequence length: no mask of the packed sequence is built, and
nothing is computed across documents. torch.compile skips the padded batches, because their shapes
differ between micro-batches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention

from finetune_trainer.engine.packing.groups import Groups
from finetune_trainer.engine.packing.layout import DocumentLayout

_MOST_WIDTH: Final = 256
"""Largest head width that FlashAttention supports."""
_LARGEST_PADDED: Final = 192
"""Wider heads are padded to ``_MOST_WIDTH`` for FlashAttention: consumer GPUs have no backward pass
for the widths in between."""
_MULTIPLE: Final = 8
"""Head widths are padded to a multiple of this, for the kernels' aligned loads."""
_WINDOW_QUERIES: Final = 1024
"""Queries per call of the memory-efficient kernel with a sliding window, for which this kernel
needs a mask."""
_EFFICIENT: Final = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def _grouped(kernel: Callable[..., Any]) -> dict[str, Any]:
    """Arguments that enable grouped queries in the variable-length kernel. The kernel of PyTorch
    2.11 has no such argument and always accepts fewer key heads."""
    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(kernel).parameters else {}


_GROUPED: Final = _grouped(varlen_attn)


def attend(
    layout: DocumentLayout, query: Tensor, key: Tensor, value: Tensor, scale: float | None,
    window: int | None,
) -> Tensor:  # fmt: skip
    """Attention of a packed sequence.

    Args:
        query: shape [1, heads, tokens, width].
        key: shape [1, key heads, tokens, width]; fewer heads than query for grouped queries.
        value: as key, but its width may differ (latent attention).
        scale: factor of the scores; None: 1 / √width.
        window: keys that a query sees, itself included; None: all earlier keys.

    Returns:
        The attended values, shape [1, tokens, heads, width of a value].
    """
    query, key, value = as_computed(query, key, value)
    if layout.shared_keys is not None:
        key, value = layout.shared_keys.gather(key), layout.shared_keys.gather(value)
    if query.is_cuda or has_kernel(query, value):
        return _on_gpu(layout, query, key, value, scale, window)
    by = _by_group if layout.shared_keys is None else _by_span
    if query.device.type != "cpu":
        return by(layout, query, key, value, scale, window)  # type: ignore[no-any-return]
    # On a CPU the backward pass of torch's kernel is 19 times as fast in float32 as in 16 bits
    # (150 tokens).
    with torch.autocast("cpu", enabled=False):
        attended: Tensor = by(layout, query.float(), key.float(), value.float(), scale, window)
    return attended.to(query.dtype)


def _on_gpu(
    layout: DocumentLayout, query: Tensor, key: Tensor, value: Tensor, scale: float | None,
    window: int | None,
) -> Tensor:  # fmt: skip
    width = value.shape[-1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if has_kernel(query, value):
        attended = _by_cu_seqlens(layout, *for_flash(query, key, value), scale, window)
    else:
        by = _by_group if layout.shared_keys is None else _by_span
        attended = by(layout, *for_efficient(query, key, value), scale, window)
    return attended[..., :width]


def for_flash(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pad query, key and value to one width, in which FlashAttention takes and saves them."""
    width = max(query.shape[-1], value.shape[-1])
    width = _MOST_WIDTH if width > _LARGEST_PADDED else width + -width % _MULTIPLE
    return _widened(query, width), _widened(key, width), _widened(value, width)


def for_efficient(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pad query, key and value as the memory-efficient kernel takes and saves them. Keys are
    repeated for every query head, because not every version of the kernel supports grouped
    queries."""
    width, value_width = (w + -w % _MULTIPLE for w in (query.shape[-1], value.shape[-1]))
    shared = query.shape[1] // key.shape[1]
    key, value = _widened(key, width), _widened(value, value_width)
    if shared > 1:
        key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
    return _widened(query, width), key, value


def _widened(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1]))


def as_computed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cast to autocast's dtype, as SDPA does. (Norms of queries return float32.)"""
    if not torch.is_autocast_enabled(query.device.type):
        return query, key, value
    half = torch.get_autocast_dtype(query.device.type)
    return query.to(half), key.to(half), value.to(half)


def has_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether the variable-length kernel supports these tensors on their device."""
    return query.is_cuda and is_flash(query, value) and _is_new_enough(query.device.index)


def is_flash(query: Tensor, value: Tensor) -> bool:
    """Whether FlashAttention supports the dtype and the head widths, on a GPU that has it."""
    halved = query.dtype in (torch.bfloat16, torch.float16)
    return halved and max(query.shape[-1], value.shape[-1]) <= _MOST_WIDTH


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_new_enough(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _by_cu_seqlens(
    layout: DocumentLayout, query: Tensor, key: Tensor, value: Tensor, scale: float | None,
    window: int | None,
) -> Tensor:  # fmt: skip
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    attended = varlen_attn(
        q, k, v, layout.cu_seqlens.q, layout.cu_seqlens.kv, layout.max_seqlen, layout.max_seqlen,
        scale=scale, window_size=(-1 if window is None else window - 1, 0), **_GROUPED,
    )  # fmt: skip
    assert isinstance(attended, Tensor)
    return attended[None]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _by_span(
    layout: DocumentLayout, query: Tensor, key: Tensor, value: Tensor, scale: float | None,
    window: int | None,
) -> Tensor:  # fmt: skip
    parts = []
    queries = torch.split(query, [span.q_len for span in layout.spans], 2)
    keys, values = (torch.split(x, [span.kv_len for span in layout.spans], 2) for x in (key, value))
    for q, k, v in zip(queries, keys, values, strict=True):
        mask = _mask(q.shape[2], k.shape[2], window, q.device)
        parts.append(_sdpa(q, k, v, mask, scale))
    return torch.cat(parts, 2).transpose(1, 2)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _by_group(
    layout: DocumentLayout, query: Tensor, key: Tensor, value: Tensor, scale: float | None,
    window: int | None,
) -> Tensor:  # fmt: skip
    groups = layout.groups
    if len(groups.sizes) == 1 and groups.sizes[0].documents == 1:
        return _attend_padded(query, key, value, scale, window).transpose(1, 2)
    heads, parts = query.shape[1], []
    # One gather for all groups: the gradient of each gather allocates and fills a tensor of the
    # whole packed sequence.
    for q, k, v in zip(*(_pad_groups(x, groups) for x in (query, key, value)), strict=True):
        attended = _attend_padded(q, k, v, scale, window)
        parts.append(attended.transpose(1, 2).reshape(-1, heads, value.shape[-1]))
    return torch.cat(parts).index_select(0, groups.unpad_index)[None]


def _attend_padded(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None
) -> Tensor:
    """Attention of documents padded to one length; shapes [documents, heads, longest, width].

    Padding follows each document, so causal attention never sees it.
    """
    if window is None or q.shape[2] <= window:
        return _sdpa(q, k, v, None, scale)
    return _windowed(q, k, v, window, scale, _WINDOW_QUERIES if q.is_cuda else q.shape[2])


def _pad_groups(x: Tensor, groups: Groups) -> list[Tensor]:
    """[1, heads, tokens, width] → [documents, heads, longest, width] of each group."""
    heads, width = x.shape[1], x.shape[3]
    taken = x.squeeze(0).index_select(1, groups.pad_index)
    parts = torch.split(taken, [group.documents * group.longest for group in groups.sizes], 1)
    return [
        part.view(heads, group.documents, group.longest, width).transpose(0, 1)
        for part, group in zip(parts, groups.sizes, strict=True)
    ]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Attention with a mask; None: causal."""
    with sdpa_kernel(_EFFICIENT) if q.is_cuda else nullcontext():
        return scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale,
            enable_gqa=k.shape[1] != q.shape[1],
        )  # fmt: skip


def _windowed(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None, at_once: int
) -> Tensor:
    """Causal sliding-window attention of whole documents, ``at_once`` queries at a time: a mask for
    all queries would be quadratic in the length."""
    length = q.shape[2]
    parts = []
    for begin in range(0, length, at_once):
        end, first = min(begin + at_once, length), max(0, begin - window + 1)
        mask = _mask(end - begin, end - first, window, q.device)
        parts.append(_sdpa(q[:, :, begin:end], k[:, :, first:end], v[:, :, first:end], mask, scale))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Keys that the last queries of a document see: bool, shape [queries, keys]."""
    last = torch.arange(keys - queries, keys, device=device)
    return sees(last, torch.arange(keys, device=device), window)


def sees(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Keys that queries see, from positions in a document: bool, shape [queries, keys]."""
    distance = queries[:, None] - keys[None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)
