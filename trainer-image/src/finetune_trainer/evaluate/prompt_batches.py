"""Batches of prompts: of similar length, bounded in memory, and shared by the ranks.

prompts ──(by length)──► batches of each rank ──► work on each ──► results in their order
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from finetune_trainer.engine.loss import evaluating
from finetune_trainer.engine.sharding import is_sharded
from finetune_trainer.engine.world import World
from finetune_trainer.liveness import progressed

MOST_TOKENS: Final = 16384
"""Tokens of a batch whose keys and values are in memory together."""
LEAST_GROUP: Final = 16
"""Prompts that begin alike from which they have batches of their own."""
LEAST_TOKENS: Final = 1024
"""Tokens from which prompts are read apart from shorter ones."""
LITTLE_PADDING: Final = 0.9
"""Length of a prompt that is padded, as a share of the longest."""

Ids = npt.NDArray[np.int32]
T = TypeVar("T")


@dataclass(frozen=True)
class PromptBatches:
    """Runs work on batches of prompts, with a model in evaluation mode."""

    world: World
    module: nn.Module
    """The model's loss module."""
    shares: bool
    """Whether what prompts of a batch begin with alike is computed once."""
    alike: bool
    """Whether the prompts of a batch must have equal lengths: padding would separate virtual tokens
    from the prompt."""

    def run(
        self,
        prompts: Sequence[Ids],
        more: int,
        copies: int,
        work: Callable[[list[Ids]], Sequence[T]],
    ) -> list[T]:
        """Return what ``work`` returns for the prompts, in order, on all ranks.

        Args:
            prompts: tokens of each, shape [tokens].
            more: tokens that follow a prompt.
            copies: copies of a prompt in the KV cache.
            work: from a batch of prompts to a result for each, with as many passes for any batch.
        """
        lengths = [len(prompt) for prompt in prompts]
        groups = groups_of(prompts) if self.shares else [list(range(len(prompts)))]
        batches = [
            batch
            for group in groups
            for batch in self._batches(
                lengths,
                sorted(group, key=lambda i: -lengths[i])[self.world.rank :: self.world.size],
                more,
                copies,
            )
        ]
        # FSDP gathers parameters: all ranks must run equally many batches.
        if is_sharded(self.module):
            most = max(self.world.on_all(lambda: len(batches)))
            batches += [[]] * (most - len(batches))

        def on_mine() -> list[tuple[int, T]]:
            done = []
            for batch in batches:
                progressed()
                results = work([prompts[i] for i in batch or [0]])
                done += list(zip(batch, results, strict=False))
            return done

        with evaluating(self.module):
            found = dict(pair for part in self.world.on_all(on_mine) for pair in part)
        return [found[i] for i in range(len(prompts))]

    def _batches(
        self, lengths: Sequence[int], order: list[int], more: int, copies: int
    ) -> Iterator[list[int]]:
        batch: list[int] = []
        for i in order:
            longest = lengths[batch[0] if batch else i]
            full = (len(batch) + 1) * (longest + more) * copies > MOST_TOKENS
            if batch and (full or (self.alike and lengths[i] != longest)):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch


def groups_of(prompts: Sequence[Ids]) -> list[list[int]]:
    """Return groups of prompts whose first half is alike, such as those behind the same examples;
    the last group is of prompts with fewer than LEAST_GROUP like them."""
    order = sorted(range(len(prompts)), key=lambda i: prompts[i].tolist())
    groups: list[list[int]] = []
    for at, i in enumerate(order):
        before = prompts[order[at - 1]]
        half = min(len(prompts[i]), len(before)) / 2
        if at and common([before, prompts[i]]) >= half:
            groups[-1].append(i)
        else:
            groups.append([i])
    large = [group for group in groups if len(group) >= LEAST_GROUP]
    others = [i for group in groups if len(group) < LEAST_GROUP for i in group]
    return [*large, others] if others else large


def parts_of(lengths: Sequence[int]) -> list[slice]:
    """Return parts of consecutive prompts with little padding.

    Args:
        lengths: of the prompts, mostly descending.
    """
    starts, longest = [0], lengths[0]
    for i, length in enumerate(lengths):
        filled = (i - starts[-1]) * longest >= LEAST_TOKENS
        if filled and length < LITTLE_PADDING * longest:
            starts.append(i)
            longest = length
        longest = max(longest, length)
    return [slice(a, b) for a, b in pairwise([*starts, len(lengths)])]


def common(prompts: Sequence[Ids]) -> int:
    """Return the number of tokens that all prompts begin with alike, and another one follows."""
    most = min(map(len, prompts)) - 1
    first = prompts[0][:most]
    unlike = [np.flatnonzero(prompt[:most] != first) for prompt in prompts[1:]]
    return min((int(at[0]) for at in unlike if len(at)), default=most)


def padded(prompts: Sequence[Ids], padding: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return tokens and mask of prompts with padding in front, shape [prompts, tokens] each."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), padding)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)
