"""The largest micro-batch that a plan can make, to estimate memory before a plan exists."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine.planning.plan import Packing
from finetune_trainer.prepared.dataset import PreparedData
from finetune_trainer.prepared.split import TESTED


@dataclass(frozen=True)
class MicroBatchSize:
    """The largest micro-batch that a plan can make."""

    tokens: int
    supervised: int
    masked: int = 0
    """Tokens of the longest document in a micro-batch with padding; 0: no padding occurs."""


def micro_batch_tokens_of(spec: FineTuneJobSpec, max_length: int, longest: int) -> int:
    """Return the most tokens of a micro-batch: the spec's value, but at least the longest sample
    with the virtual tokens before it."""
    wanted = spec.training.micro_batch_tokens or max(max_length, 2048)
    return max(wanted, longest + spec.method.virtual_tokens)


Ints = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Samples:
    """Sample statistics that bound the size of micro-batches."""

    lengths: Ints
    """Tokens of each sample."""
    supervised: Ints
    """Supervised tokens of each sample."""
    max_length: int
    """Most tokens that a sample may have."""

    @property
    def longest(self) -> int:
        return int(self.lengths.max(initial=1))

    def largest_micro_batch(self, spec: FineTuneJobSpec, packing: Packing) -> MicroBatchSize:
        """Return upper bounds of the size of any micro-batch: from a step of the longest samples,
        and from samples with the largest share of supervised tokens."""
        if packing == "Unpacked":
            return MicroBatchSize(
                self.longest + spec.method.virtual_tokens, int(self.supervised.max(initial=1))
            )
        room = micro_batch_tokens_of(spec, self.max_length, self.longest)
        batch = len(self.lengths)
        if spec.method.kind.trains:
            batch = min(spec.training.batch_size, batch)
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
        """Return the supervised tokens of a micro-batch of ``room`` tokens, filled with the samples
        with the largest share of supervised tokens, the last sample in part."""
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


def samples_of(spec: FineTuneJobSpec, data: PreparedData) -> Samples:
    """Return the samples that bound the micro-batches: those to train on or, where nothing is
    trained, those that are measured."""
    sides = ("train",) if spec.method.kind.trains else TESTED
    found = [data.index(side) for side in sides]
    return Samples(
        np.concatenate([index.length for index in found]),
        np.concatenate([index.supervised for index in found]),
        data.manifest.max_length,
    )


def _largest(values: Ints, count: int) -> Ints:
    """Return the ``count`` largest values."""
    return np.partition(values.astype(np.int64), len(values) - count)[len(values) - count :]
