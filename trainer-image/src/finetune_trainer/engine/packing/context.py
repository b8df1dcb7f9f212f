"""Context parallelism: the processes of a group share the tokens of each packed sequence.

A packed sequence is cut into 2n chunks for n processes, and process i holds chunks i and 2n-1-i.
Later tokens see more keys, so a pair of an early and a late chunk balances the work (order of
Brandon et al. 2023, arXiv:2311.09431). Everything except attention works on local tokens.
Attention all-gathers the keys and values of the whole sequence (with grouped queries they are its
smallest tensors), selects the keys that local queries see, and reduce-scatters their gradients.

The loss is a sum over tokens and the gradient a sum over processes, so no other code handles
context parallelism. (The router loss of a mixture of experts is no such sum: the API does not
allow it with context parallelism.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from finetune_trainer.engine.packing.transfer import on_device

Ints = npt.NDArray[np.int64]


class Span(NamedTuple):
    """Consecutive queries of one document. ``kv_len``: keys that the last query sees, from the
    start of the document; each earlier query sees one key fewer."""

    q_len: int
    kv_len: int


@dataclass(frozen=True)
class ContextGroup:
    """Processes that share packed sequences."""

    index: int
    """Rank of this process in the group."""
    size: int
    group: dist.ProcessGroup | None
    """None for a group of one process."""

    def padding(self, tokens: int) -> int:
        """Padding tokens that make a packed sequence divisible into chunks."""
        return 0 if self.size == 1 else -tokens % (2 * self.size)

    def held(self, tokens: int, index: int | None = None) -> Ints:
        """Positions in the packed sequence that a process of the group holds, in order. Default:
        this process."""
        if self.size == 1:
            return np.arange(tokens)
        chunk = tokens // (2 * self.size)
        index = self.index if index is None else index
        last = 2 * self.size - 1 - index
        first = np.arange(index * chunk, (index + 1) * chunk)
        return np.concatenate([first, np.arange(last * chunk, (last + 1) * chunk)])


ALONE: Final = ContextGroup(0, 1, None)
"""No context parallelism."""


@dataclass(frozen=True)
class SharedKeys:
    """Keys that the local spans see, among the gathered keys of the group."""

    index: Tensor
    """Indices into the gathered tokens, span after span; shape [keys]."""
    group: dist.ProcessGroup

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def gather(self, x: Tensor) -> Tensor:
        """[1, heads, local tokens, width] → [1, heads, keys, width]."""
        return cast(Tensor, _Gathered.apply(x, self.group)).index_select(2, self.index)


class _Gathered(torch.autograd.Function):
    """All-gather of the tokens of a group, in rank order; the backward pass is a reduce-scatter.

    torch's differentiable collectives return tensors that wait at their first use. Attention uses
    the result immediately, so the plain blocking collectives are used.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        """[1, heads, local tokens, width] → [1, heads, tokens of the group, width]."""
        ctx.group, ctx.size = group, dist.get_world_size(group)
        tokens = x.transpose(0, 2).contiguous()  # gathers concatenate dimension 0
        whole = tokens.new_empty(ctx.size * len(tokens), *tokens.shape[1:])
        dist.all_gather_into_tensor(whole, tokens, group=group)
        return whole.transpose(0, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        whole = grads[0].transpose(0, 2).contiguous()
        mine = whole.new_empty(len(whole) // ctx.size, *whole.shape[1:])
        dist.reduce_scatter_tensor(mine, whole, group=ctx.group)
        return mine.transpose(0, 2), None


def share(
    lengths: Sequence[int], group: ContextGroup, device: torch.device
) -> tuple[tuple[Span, ...], SharedKeys | None]:
    """Spans of this process, and the keys they need, for a packed sequence of documents of these
    lengths. The sum of lengths includes ``ContextGroup.padding``."""
    if group.size == 1 or group.group is None:
        return tuple(Span(n, n) for n in lengths), None
    starts = np.cumsum([0, *lengths])
    tokens = int(starts[-1])
    order = np.concatenate([group.held(tokens, i) for i in range(group.size)])
    place = np.empty(tokens, np.int64)
    place[order] = np.arange(tokens)
    spans, take = [], []
    half = tokens // (2 * group.size)
    held = group.held(tokens)
    for begin in (int(held[0]), int(held[half])):
        end = begin + half
        for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            first, last = max(begin, start), min(end, stop)
            if first < last:
                spans.append(Span(last - first, last - start))
                take.append(place[start:last])
    return tuple(spans), SharedKeys(on_device(np.concatenate(take), device), group.group)
