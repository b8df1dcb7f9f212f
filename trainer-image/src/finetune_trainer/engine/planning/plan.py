"""The plan: which samples are trained in which step, in which micro-batch, on which rank.

    lengths, supervised counts, seed ──► Plan.step(t) ──► Step(micro-batches by rank, denominator)

Everything here is a pure function of the index and a few integers. The state of a reader is
therefore a step number: resuming costs nothing, and the samples of a step are the same at any
number of processes and under any packing.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from finetune_trainer.engine.planning.mixture import Curriculum, Ints, Stage

MicroBatchSamples = tuple[int, ...]
"""Index positions of the samples of one micro-batch."""
Packing = Literal["Concatenated", "Padded", "Unpacked"]
"""How documents share a micro-batch: concatenated, padded to the longest, or one document each."""

# Length at which attention costs as much as everything that is linear in the length. It only
# affects the balance between ranks. Measured on Llama shapes: 4k (small) to 30k (7B).
_QUADRATIC_LENGTH = 8192
_TRIED_PARTS: Final = 4
_TRIED_TOGETHER: Final = 4
"""``uniform_micro_batch`` measures some parts of a run, each of some consecutive steps: every pass
over the data that it touches costs a permutation of all samples."""
_TRIED_COUNTS: Final = 8
_WORTH_IT: Final = 0.995
"""A shorter micro-batch multiplies smaller matrices, so its padded tokens must be below this
fraction of the best so far."""
_MULTIPLE: Final = 16
"""Sizes of micro-batches are multiples of this, for kernels and for context parallelism."""


def cost(length: int) -> float:
    """Return the relative time of a document of ``length`` tokens: linear plus quadratic part."""
    return length * (1.0 + length / _QUADRATIC_LENGTH)


def pack(lengths: Sequence[int], capacity: int, ranks: int) -> list[list[list[int]]]:
    """Deal documents to ranks and micro-batches: ``result[rank][micro_batch]`` lists positions in
    ``lengths``.

    Every rank gets the same number of micro-batches (some may be empty), the fewest for which none
    exceeds ``capacity`` tokens. Costs are balanced by longest-processing-time-first (Graham 1969),
    so that ranks finish together. Micro-batches of a rank are sorted by falling cost, so that ranks
    that synchronize after each one have similar costs. A document above the capacity is an error of
    the caller: samples are cut to maxLength before, and micro-batches hold at least that.

    Raises:
        ValueError: where a document exceeds the capacity.
    """
    longest = max(lengths, default=0)
    if longest > capacity:
        raise ValueError(f"a document of {longest} tokens does not fit a micro-batch of {capacity}")
    order = _by_length(lengths)
    per_rank = max(1, -(-sum(lengths) // (capacity * ranks)))
    while True:
        micro_batches = _partition(order, lengths, capacity, per_rank * ranks)
        if micro_batches is not None:
            break
        per_rank += 1
    micro_batches.sort(key=lambda micro_batch: -sum(cost(lengths[i]) for i in micro_batch))
    return [micro_batches[rank::ranks] for rank in range(ranks)]


def _partition(
    order: Sequence[int], lengths: Sequence[int], capacity: int, count: int
) -> list[list[int]] | None:
    """Return ``count`` micro-batches of balanced cost; None where the documents do not fit."""
    micro_batches: list[list[int]] = [[] for _ in range(count)]
    used = [0] * count
    heap = [(0.0, micro_batch) for micro_batch in range(count)]
    for i in order:
        # The cheapest micro-batch with enough space; the skipped ones are put back.
        passed = []
        while heap and used[heap[0][1]] + lengths[i] > capacity:
            passed.append(heapq.heappop(heap))
        if not heap:
            return None
        load, micro_batch = heapq.heappop(heap)
        micro_batches[micro_batch].append(i)
        used[micro_batch] += lengths[i]
        heapq.heappush(heap, (load + cost(lengths[i]), micro_batch))
        for entry in passed:
            heapq.heappush(heap, entry)
    return micro_batches


@dataclass(frozen=True)
class Step:
    """One optimizer step."""

    number: int
    """Number of the step, from 0."""
    samples: tuple[int, ...]
    """Index positions of its samples, in the order of the plan."""
    micro_batches: tuple[tuple[MicroBatchSamples, ...], ...]
    """The same samples in micro-batches, by rank; all ranks have the same number of micro-batches,
    empty ones included."""
    supervised: int
    """Supervised tokens of the global batch: the denominator of the loss."""
    tokens: int
    """Tokens of the global batch."""
    first_visits: tuple[int, ...] = ()
    """Numbers of the samples, in ``samples``, that the run sees for the first time."""

    @property
    def numbers(self) -> dict[int, int]:
        """Number of each sample in ``samples``, by index position; of a sample that is there twice,
        the first."""
        return {p: i for i, p in reversed([*enumerate(self.samples)])}


class Plan:
    """The whole training, as a function of the step.

    Args:
        lengths: tokens of each training sample, shape [n].
        supervised: supervised tokens of each training sample, shape [n].
        sources: source index of each sample, shape [n]; None: one source.
        stages: mixture of each stage; None: one stage, sources in proportion to size.
        batch_size: samples per step, over all ranks; limited to the number of samples.
        visits: samples after which the training ends, with a shorter last step; None: no end.
        seed: seed of the sample order.
        micro_batch_tokens: most tokens of one micro-batch; at least the longest sample.
        ranks: number of ranks; processes that share micro-batches count as one.
        packing: how samples share a micro-batch; "Unpacked" where models cannot isolate them.
        virtual_tokens: tokens that the method puts before each sample; ``micro_batch_tokens``
            includes them.
    """

    def __init__(
        self,
        lengths: npt.NDArray[np.integer],
        supervised: npt.NDArray[np.integer],
        *,
        batch_size: int,
        seed: int,
        micro_batch_tokens: int,
        ranks: int,
        sources: npt.NDArray[np.integer] | None = None,
        stages: Sequence[Stage] | None = None,
        visits: int | None = None,
        packing: Packing = "Concatenated",
        virtual_tokens: int = 0,
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.supervised = np.asarray(supervised, dtype=np.int64)
        self.seed = seed
        self.micro_batch_tokens = micro_batch_tokens
        self.ranks = ranks
        self.packing: Packing = packing
        self._virtual_tokens = virtual_tokens
        self._batch = min(batch_size, len(self.lengths))
        self._visits = visits
        self.left_out: Ints = np.empty(0, np.int64)
        """Sorted index positions of the samples that are left out of all steps."""
        self.sources = np.zeros(len(self.lengths), np.int64)
        if sources is not None:
            self.sources[:] = sources
        self.source_count = int(self.sources.max()) + 1
        """Number of sources."""
        self._curriculum = Curriculum(
            self.sources, self.lengths, self.source_count, stages or [Stage(0)], self._batch, seed
        )

    def leave_out(self, steps: Iterable[int]) -> None:
        """Leave exactly the samples of these steps out of all steps; the other samples keep their
        steps."""
        self.left_out = self.drawn(steps)

    def drawn(self, steps: Iterable[int]) -> Ints:
        """Return the sorted index positions of the samples of some steps, each once, including
        those that are left out."""
        found = [np.empty(0, np.int64), *(self._drawn(step) for step in steps)]
        return np.unique(np.concatenate(found))

    def visited(self, step: int) -> int:
        """Return the number of samples drawn before a step, left-out samples included."""
        visited = step * self._batch
        return visited if self._visits is None else min(visited, self._visits)

    def stage(self, step: int) -> str | None:
        """Return the name of a step's stage in ``data.stages``; None: no stages."""
        return self._curriculum.name_of(step)

    def samples(self, step: int) -> Ints:
        """Return the index positions of the samples of a step, in order."""
        found = self._drawn(step)
        return found[self._kept(found)]

    def _kept(self, positions: Ints) -> npt.NDArray[np.bool_]:
        return ~np.isin(positions, self.left_out)

    def _drawn(self, step: int) -> Ints:
        found = self._curriculum.samples(step)
        return found[: self.visited(step + 1) - self.visited(step)]

    def step(self, number: int) -> Step:
        """Return the micro-batches and the denominator of a step."""
        drawn = self._drawn(number)
        kept = self._kept(drawn)
        positions = drawn[kept]
        first_visits = self._curriculum.first_visits(number)[: len(drawn)][kept]
        lengths = self.lengths[positions].tolist()
        taken = [n + self._virtual_tokens for n in lengths]
        dealt = _PACK[self.packing](taken, self.micro_batch_tokens, self.ranks)
        return Step(
            number=number,
            samples=tuple(positions.tolist()),
            micro_batches=tuple(
                tuple(
                    tuple(int(positions[i]) for i in micro_batch) for micro_batch in micro_batches
                )
                for micro_batches in dealt
            ),
            supervised=int(self.supervised[positions].sum()),
            tokens=int(sum(lengths)),
            first_visits=tuple(np.flatnonzero(first_visits).tolist()),
        )


def uniform_micro_batch(plan: Plan, steps: int) -> int:
    """Return the size, in tokens, for micro-batches that must all have one size (torch.compile):
    the size with the least padding, among the plan's size and some shorter ones.

    Measured on some steps of a few parts of the run, so a resumed run with the same number of ranks
    gets the same size.
    """
    starts = np.linspace(0, steps - _TRIED_TOGETHER, _TRIED_PARTS).astype(np.int64)
    tried = (starts[:, None] + np.arange(_TRIED_TOGETHER)).clip(0, steps - 1)
    some: list[int] = np.unique(tried).tolist()
    sizes = [plan.lengths[plan.samples(step)].tolist() for step in some]
    totals = [sum(step) / plan.ranks for step in sizes]
    longest = int(plan.lengths.max())

    def padded(micro_batch: int) -> int:
        return micro_batch * sum(len(pack(step, micro_batch, plan.ranks)[0]) for step in sizes)

    best, least = plan.micro_batch_tokens, padded(plan.micro_batch_tokens) * _WORTH_IT
    fewest = -(-int(max(totals)) // plan.micro_batch_tokens)
    for micro_batches in range(fewest, fewest + _TRIED_COUNTS):
        for share in (0.75, 0.9, 1.0):
            for slack in (1.0, 1.02):
                wanted = float(np.quantile(totals, share)) * slack / micro_batches
                micro_batch = max(longest, -(-int(wanted + 1) // _MULTIPLE) * _MULTIPLE)
                if micro_batch < plan.micro_batch_tokens and (found := padded(micro_batch)) < least:
                    best, least = micro_batch, found * _WORTH_IT
    return best


def pack_singly(lengths: Sequence[int], capacity: int, ranks: int) -> list[list[list[int]]]:
    """As ``pack``, with one document per micro-batch."""
    return _deal([[i] for i in _by_length(lengths)], ranks)


def pack_padded(lengths: Sequence[int], capacity: int, ranks: int) -> list[list[list[int]]]:
    """As ``pack``, for micro-batches padded to their longest document, of at most ``capacity``
    tokens including padding. Documents of similar length share a micro-batch. Every rank gets the
    same number, the fewest possible; their sizes are as even as possible."""
    order = _by_length(lengths)

    def micro_batches_of(size: int) -> list[list[int]]:
        micro_batches: list[list[int]] = []
        for i in order:
            if (
                micro_batches
                and (len(micro_batches[-1]) + 1) * lengths[micro_batches[-1][0]] <= size
            ):
                micro_batches[-1].append(i)
            else:
                micro_batches.append([i])
        return micro_batches

    most = ranks * -(-len(micro_batches_of(capacity)) // ranks)
    low, high = max(lengths, default=0), capacity
    while low < high:  # the smallest size that needs no more micro-batches
        middle = (low + high) // 2
        low, high = (low, middle) if len(micro_batches_of(middle)) <= most else (middle + 1, high)
    micro_batches = micro_batches_of(low)
    micro_batches.sort(key=lambda micro_batch: -len(micro_batch) * cost(lengths[micro_batch[0]]))
    return _deal(micro_batches, ranks)


_PACK: Final[dict[Packing, Callable[[Sequence[int], int, int], list[list[list[int]]]]]] = {
    "Concatenated": pack,
    "Padded": pack_padded,
    "Unpacked": pack_singly,
}


def _by_length(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def _deal(micro_batches: list[list[int]], ranks: int) -> list[list[list[int]]]:
    """Deal micro-batches to ranks, the same number (at least one) to each; add empty ones."""
    micro_batches += [[] for _ in range(-len(micro_batches) % ranks if micro_batches else ranks)]
    return [micro_batches[rank::ranks] for rank in range(ranks)]


def pack_all(
    lengths: npt.NDArray[np.integer],
    capacity: int,
    ranks: int,
    packing: Packing = "Concatenated",
    virtual_tokens: int = 0,
) -> list[list[MicroBatchSamples]]:
    """Return micro-batches by rank for one pass over a whole set (evaluation), with documents of
    similar length together.

    Samples are sorted by length and split into windows before packing, so that packing time is
    linear in the size of the set.
    """
    order = np.argsort(lengths, kind="stable")
    window = 4096
    dealt: list[list[MicroBatchSamples]] = [[] for _ in range(ranks)]
    for start in range(0, len(order), window):
        positions = order[start : start + window]
        sizes = (lengths[positions] + virtual_tokens).tolist()
        micro_batches = _PACK[packing](sizes, capacity, ranks)
        for rank in range(ranks):
            dealt[rank].extend(
                tuple(int(positions[i]) for i in micro_batch) for micro_batch in micro_batches[rank]
            )
    return dealt
