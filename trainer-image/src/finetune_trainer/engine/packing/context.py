"""Context parallelism: the processes of a group share the tokens of each row.

A row is cut into 2n chunks for n processes, and process i holds chunks i and 2n-1-i: the later a
token, the more keys it sees, so both the short and the long end make the work alike (the order of
Brandon et al. 2023, arXiv:2311.09431). Everything but attention works on the tokens that are here.
Attention gathers the keys and values of the whole row (with grouped queries they are the smallest
of its tensors), takes those that its own queries may see, and gives their gradients back.

The loss is a sum over tokens and the gradient a sum over processes, so nothing else knows of it.
(The router loss of a mixture of experts is no such sum: the contract keeps it from shared rows.)
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
    """Consecutive queries of one document, and the keys that the last of them sees: those of the
    document up to it. The other queries see fewer, one by one."""

    q_len: int
    kv_len: int


@dataclass(frozen=True)
class ContextGroup:
    """The processes that share rows, and this one's place among them."""

    index: int
    size: int
    group: dist.ProcessGroup | None
    """None where the group is this process alone."""

    def padding(self, tokens: int) -> int:
        """Tokens to add to a row so that it can be shared."""
        return 0 if self.size == 1 else -tokens % (2 * self.size)

    def held(self, tokens: int, index: int | None = None) -> Ints:
        """Row positions that a process of the group holds (this one, by default), in order."""
        if self.size == 1:
            return np.arange(tokens)
        chunk = tokens // (2 * self.size)
        index = self.index if index is None else index
        last = 2 * self.size - 1 - index
        first = np.arange(index * chunk, (index + 1) * chunk)
        return np.concatenate([first, np.arange(last * chunk, (last + 1) * chunk)])


ALONE: Final = ContextGroup(0, 1, None)
"""A process that has its rows to itself."""


@dataclass(frozen=True)
class Wanted:
    """Keys that the spans of a share see, of those that the group gathers."""

    take: Tensor
    """Where they lie among the gathered tokens, span after span; shape [keys]."""
    group: dist.ProcessGroup

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def gather(self, x: Tensor) -> Tensor:
        """[1, heads, tokens here, width] → [1, heads, keys, width]."""
        return cast(Tensor, _Gathered.apply(x, self.group)).index_select(2, self.take)


class _Gathered(torch.autograd.Function):
    """Tokens of all processes of a group, process after process; each gets the gradients of its own
    from all of them.

    torch's own of this kind hand on tensors that wait when they are first used. Attention uses
    these at once, so it waits here, with the plain collectives.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        """[1, heads, tokens here, width] → [1, heads, tokens of the group, width]."""
        ctx.group, ctx.size = group, dist.get_world_size(group)
        tokens = x.transpose(0, 2).contiguous()  # what is gathered lies one behind the other
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
) -> tuple[tuple[Span, ...], Wanted | None]:
    """Spans of this process, for a row of documents of these lengths (padded as ``padding``
    says)."""
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
    return tuple(spans), Wanted(on_device(np.concatenate(take), device), group.group)
