"""The largest row that a plan can make, by which memory is estimated before there is a plan."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine.planning.plan import Packing


@dataclass(frozen=True)
class MicroBatchSize:
    """The largest row that a plan can make."""

    tokens: int
    supervised: int
    masked: int = 0
    """Tokens of the longest document in a row with padding; 0: no row has any."""


def micro_batch_tokens_of(spec: FineTuneJobSpec, max_length: int, longest: int) -> int:
    """Most tokens of a row: the spec's, but at least the longest sample, with the virtual tokens
    before it."""
    wanted = spec.training.micro_batch_tokens or max(max_length, 2048)
    return max(wanted, longest + spec.method.virtual_tokens)


Ints = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Samples:
    """What the size of rows depends on."""

    lengths: Ints
    """Tokens of each training sample."""
    supervised: Ints
    """Of them, those that are learned."""
    max_length: int
    """Most tokens that a sample may have."""

    @property
    def longest(self) -> int:
        return int(self.lengths.max(initial=1))

    def largest_micro_batch(self, spec: FineTuneJobSpec, packing: Packing) -> MicroBatchSize:
        """Bounds of the sizes of any row: of as many samples as a step has, as long as they come,
        and of those with the largest share of learned tokens."""
        if packing == "Unpacked":
            return MicroBatchSize(
                self.longest + spec.method.virtual_tokens, int(self.supervised.max(initial=1))
            )
        room = micro_batch_tokens_of(spec, self.max_length, self.longest)
        batch = min(spec.training.batch_size, len(self.lengths))
        if packing == "Padded":
            tokens = min(room, batch * (self.longest + spec.method.virtual_tokens))
            learned = int(_largest(self.supervised, batch).sum())
            masked = min(tokens // 2, self.longest + spec.method.virtual_tokens)
            return MicroBatchSize(tokens, min(tokens, learned), masked if batch > 1 else 0)
        tokens = room
        if not spec.training.compile:
            tokens = min(room, int(_largest(self.lengths, batch).sum()))
        learned = int(_largest(self.supervised, batch).sum())
        return MicroBatchSize(tokens, min(tokens, learned, self._densest(tokens)))

    def _densest(self, room: int) -> int:
        """Learned tokens of a row filled with the samples in which their share is largest, the last
        of them in part."""
        lengths = np.maximum(self.lengths.astype(np.int64), 1)
        order = np.argsort(-(self.supervised / lengths), kind="stable")
        filled = np.cumsum(lengths[order])
        learned = np.cumsum(self.supervised[order].astype(np.int64))
        whole = int(np.searchsorted(filled, room, side="right"))
        if whole == len(order):
            return int(learned[-1])
        before = (int(filled[whole - 1]), int(learned[whole - 1])) if whole else (0, 0)
        next_one = order[whole]
        share = self.supervised[next_one] / lengths[next_one]
        return before[1] + int(np.ceil((room - before[0]) * share))


def _largest(values: Ints, count: int) -> Ints:
    """The ``count`` largest of some values."""
    return np.partition(values.astype(np.int64), len(values) - count)[len(values) - count :]
