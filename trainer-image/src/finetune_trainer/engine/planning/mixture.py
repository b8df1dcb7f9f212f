"""The mixture: in which order the samples of several sources are trained.

    source ──► line: pass after pass over its samples, each pass in an order of its own
    lines  ──► mixture: all samples by virtual time, (tokens before + half its own) / share

This is weighted fair queueing (Demers, Keshav & Shenker 1989) over tokens: up to any point of the
mixture, each source has had its share of the tokens, give or take a sample. Chance decides only the
order of a pass, so any part of the mixture is computed without the parts before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Pass:
    """One pass over a source."""

    positions: Ints
    """Index positions in their order, shape [n]."""
    starts: Ints
    """Tokens of the pass before each sample, and before its end, shape [n + 1]."""


class Line:
    """One source without end.

    Args:
        positions: index positions of its samples, shape [n], n at least 1.
        lengths: their tokens, shape [n], each at least 1.
        seed: of the orders of the passes, below 2**32.
        stream: number of the source: sources of one seed have different orders.
    """

    def __init__(self, positions: Ints, lengths: Ints, seed: int, stream: int) -> None:
        self._positions = positions
        self._lengths = lengths
        self._key = seed | stream << 32
        self.samples = len(positions)
        """Samples of a pass."""
        self.tokens = int(lengths.sum())
        """Tokens of a pass."""
        self._pass = lru_cache(maxsize=2)(self._make_pass)

    def _make_pass(self, number: int) -> _Pass:
        # Philox is counter-based: a pass needs no state of the passes before.
        key = np.array([self._key, number], dtype=np.uint64)
        order = np.random.Generator(np.random.Philox(key=key)).permutation(self.samples)
        starts = np.zeros(self.samples + 1, np.int64)
        np.cumsum(self._lengths[order], out=starts[1:])
        return _Pass(self._positions[order], starts)

    def tokens_before(self, sample: int) -> int:
        """Tokens of the line before its sample of that number."""
        passes, within = divmod(sample, self.samples)
        return passes * self.tokens + (int(self._pass(passes).starts[within]) if within else 0)

    def samples_before(self, tokens: float) -> int:
        """Samples whose middle lies before that many tokens of the line."""
        passes = int(tokens // self.tokens)
        rest = tokens - passes * self.tokens
        if not rest:
            return passes * self.samples
        starts = self._pass(passes).starts
        begun = int(np.searchsorted(starts[:-1], rest, side="left"))
        half_done = begun and (starts[begun - 1] + starts[begun]) / 2 < rest
        return passes * self.samples + begun - (not half_done)

    def slice(self, first: int, last: int) -> tuple[Ints, Floats]:
        """Positions of the samples ``first`` to ``last`` (excluded), and the middle of each in
        tokens of the line."""
        positions, middles = [np.empty(0, np.int64)], [np.empty(0)]
        for number in range(first // self.samples, -(-last // self.samples)):
            begin = number * self.samples
            part = slice(max(0, first - begin), min(self.samples, last - begin))
            found = self._pass(number)
            ends = found.starts[part.start : part.stop + 1]
            positions.append(found.positions[part])
            middles.append((ends[:-1] + ends[1:]) / 2 + number * self.tokens)
        return np.concatenate(positions), np.concatenate(middles)


class Mixture:
    """Samples of several lines in proportion, without end.

    It is computed in rounds: a round has as many tokens as all sources together, so that in
    proportion to size each source is read once a round.

    Args:
        lines: the sources.
        shares: of the tokens, shape [sources]; not negative, their sum above 0.
        first: sample of each line with which the mixture begins.
    """

    def __init__(
        self, lines: Sequence[Line], shares: Sequence[float], first: Sequence[int]
    ) -> None:
        total = sum(shares)
        used = [i for i, share in enumerate(shares) if share > 0]
        self._lines = [lines[i] for i in used]
        self._first = [first[i] for i in used]
        self._base = [lines[i].tokens_before(first[i]) for i in used]
        round_tokens = sum(line.tokens for line in self._lines)
        self._budgets = [shares[i] / total * round_tokens for i in used]
        self._used = used
        self._sources = len(lines)
        self._round = lru_cache(maxsize=2)(self._make_round)

    @classmethod
    def in_proportion(cls, lines: Sequence[Line], first: Sequence[int]) -> Mixture:
        """The mixture in which each source has as many tokens as it is large."""
        return cls(lines, [line.tokens for line in lines], first)

    def samples(self, first: int, last: int) -> Ints:
        """Index positions of the samples ``first`` to ``last`` (excluded) of the mixture."""
        parts = []
        number = self._round_of(first)
        while first < last:
            begin, positions, _ = self._round(number)
            part = positions[first - begin : last - begin]
            parts.append(part)
            first += len(part)
            number += 1
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def taken(self, count: int) -> list[int]:
        """Samples that the first ``count`` of the mixture take of each source, shape [sources]."""
        taken = [0] * self._sources
        if not count:
            return taken
        number = self._round_of(count - 1)
        begin, _, sources = self._round(number)
        within = np.bincount(sources[: count - begin], minlength=len(self._used))
        for i, before, more in zip(self._used, self._before(number), within, strict=True):
            taken[i] = before + int(more)
        return taken

    def _before(self, number: int) -> list[int]:
        """Samples of each used line that the rounds before this one take."""
        return [
            line.samples_before(base + number * budget) - first
            for line, base, budget, first in zip(
                self._lines, self._base, self._budgets, self._first, strict=True
            )
        ]

    def _round_of(self, sample: int) -> int:
        """The round in which a sample of the mixture lies."""
        # Whole passes give the round to within the last, partial pass of each line.
        number = 0
        a_round = sum(
            line.samples * budget / line.tokens
            for line, budget in zip(self._lines, self._budgets, strict=True)
        )
        number = int(sample / a_round)
        while sum(self._before(number)) > sample:
            number -= 1
        while sum(self._before(number + 1)) <= sample:
            number += 1
        return number

    def _make_round(self, number: int) -> tuple[int, Ints, Ints]:
        """First sample of a round, its positions in their order, and the (used) source of each."""
        firsts, lasts = self._before(number), self._before(number + 1)
        positions, times, sources = [], [], []
        for i, line in enumerate(self._lines):
            found, middles = line.slice(self._first[i] + firsts[i], self._first[i] + lasts[i])
            positions.append(found)
            times.append((middles - self._base[i]) / self._budgets[i])
            sources.append(np.full(len(found), i))
        # Stable: of equal times the earlier source is first. The parts are sorted, so it is quick.
        order = np.argsort(np.concatenate(times), kind="stable")
        return sum(firsts), np.concatenate(positions)[order], np.concatenate(sources)[order]


@dataclass(frozen=True)
class Stage:
    """A part of the training with a mixture of its own."""

    steps: int
    """Steps of it."""
    shares: Sequence[float] | None = None
    """Of the tokens, by source; None: in proportion to size."""
    name: str | None = None
    """As ``data.stages`` has it; None: the training has no stages."""


class Curriculum:
    """The samples of every step: stage after stage, each going on where the one before it stopped
    reading its sources.

    Args:
        sources: number of the source of each sample of the index, shape [n].
        lengths: tokens of each, shape [n].
        count: sources there are; each has a sample at least.
        stages: in their order, one at least; the last goes on without end.
        batch: samples of a step.
        seed: of the order.
    """

    def __init__(
        self,
        sources: npt.NDArray[np.integer],
        lengths: Ints,
        count: int,
        stages: Sequence[Stage],
        batch: int,
        seed: int,
    ) -> None:
        places = [np.flatnonzero(sources == number) for number in range(count)]
        self._lines = [Line(at, lengths[at], seed, i) for i, at in enumerate(places)]
        self._stages = list(stages)
        self._begins = np.cumsum([0, *(stage.steps for stage in self._stages[:-1])])
        self._batch = batch
        self._mixture = lru_cache(maxsize=2)(self._make_mixture)
        self._first = lru_cache(maxsize=None)(self._make_first)

    def samples(self, step: int) -> Ints:
        """Index positions of the samples of a step, in order, shape [batch]."""
        stage = self.stage_of(step)
        within = (step - int(self._begins[stage])) * self._batch
        return self._mixture(stage).samples(within, within + self._batch)

    def stage_of(self, step: int) -> int:
        """Number of the stage that a step belongs to."""
        return int(np.searchsorted(self._begins, step, side="right")) - 1

    def name_of(self, step: int) -> str | None:
        """Name of the stage that a step belongs to, where stages have names."""
        return self._stages[self.stage_of(step)].name

    def _make_mixture(self, stage: int) -> Mixture:
        shares, first = self._stages[stage].shares, self._first(stage)
        if shares is None:
            return Mixture.in_proportion(self._lines, first)
        return Mixture(self._lines, shares, first)

    def _make_first(self, stage: int) -> tuple[int, ...]:
        """Samples of each source that the stages before this one have taken."""
        if not stage:
            return (0,) * len(self._lines)
        before = stage - 1
        taken = self._make_mixture(before).taken(self._stages[before].steps * self._batch)
        return tuple(a + b for a, b in zip(self._first(before), taken, strict=True))
