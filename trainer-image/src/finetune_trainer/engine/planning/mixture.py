"""The mixture: the order in which the samples of several sources are trained.

    source ──► line: pass after pass over its samples, each pass in a different order
    lines  ──► mixture: all samples by virtual time, (tokens before + half its own) / share

This is weighted fair queueing (Demers, Keshav & Shenker 1989) over tokens: up to any point of the
mixture, each source has its share of the tokens, within about one sample. Only the order of a pass
is random, so any part of the mixture is computed without the parts before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Pass:
    """One pass over a source."""

    positions: Ints
    """Index positions in the order of the pass, shape [n]."""
    starts: Ints
    """Tokens of the pass before each sample, then their total, shape [n + 1]."""


class _Round(NamedTuple):
    """One round of a mixture; arrays of shape [samples of the round], in its order."""

    begin: int
    """Number of its first sample in the mixture."""
    positions: Ints
    sources: Ints
    """Index of each sample's source among the sources that the mixture uses."""
    first_visits: npt.NDArray[np.bool_]
    """Whether a sample is in the first pass over its source."""


class Line:
    """Endless sequence of one source's samples.

    Args:
        positions: index positions of its samples, shape [n], n at least 1.
        lengths: tokens of each sample, shape [n], each at least 1.
        seed: seed of the orders of the passes, below 2**32.
        stream: source index, so that sources with one seed have different orders.
    """

    def __init__(self, positions: Ints, lengths: Ints, seed: int, stream: int) -> None:
        self._positions = positions
        self._lengths = lengths
        self._key = seed | stream << 32
        self.samples = len(positions)
        """Samples per pass."""
        self.tokens = int(lengths.sum())
        """Tokens per pass."""
        self._pass = lru_cache(maxsize=2)(self._make_pass)

    def _make_pass(self, number: int) -> _Pass:
        # Philox is counter-based: a pass needs no state of earlier passes.
        key = np.array([self._key, number], dtype=np.uint64)
        order = np.random.Generator(np.random.Philox(key=key)).permutation(self.samples)
        starts = np.zeros(self.samples + 1, np.int64)
        np.cumsum(self._lengths[order], out=starts[1:])
        return _Pass(self._positions[order], starts)

    def tokens_before(self, sample: int) -> int:
        """Return the tokens of the line before its sample number ``sample``."""
        passes, within = divmod(sample, self.samples)
        return passes * self.tokens + (int(self._pass(passes).starts[within]) if within else 0)

    def samples_before(self, tokens: float) -> int:
        """Return the number of samples whose middle is before token ``tokens`` of the line."""
        passes = int(tokens // self.tokens)
        rest = tokens - passes * self.tokens
        if not rest:
            return passes * self.samples
        starts = self._pass(passes).starts
        begun = int(np.searchsorted(starts[:-1], rest, side="left"))
        half_done = begun and (starts[begun - 1] + starts[begun]) / 2 < rest
        return passes * self.samples + begun - (not half_done)

    def slice(self, first: int, last: int) -> tuple[Ints, Floats]:
        """Return the positions of samples ``first`` to ``last`` (excluded), and the middle of each
        in tokens of the line."""
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
    """Endless sequence of the samples of several lines, by their shares.

    It is computed in rounds. A round has as many tokens as all sources together, so with shares in
    proportion to size a round reads each source once.

    Args:
        lines: the sources.
        shares: shares of the tokens, shape [sources]; not negative, their sum above 0.
        first: sample of each line at which the mixture begins.
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
        """Return the mixture whose shares are the sizes of the sources, in tokens."""
        return cls(lines, [line.tokens for line in lines], first)

    def samples(self, first: int, last: int) -> Ints:
        """Return the index positions of samples ``first`` to ``last`` (excluded) of the mixture."""
        parts = [each.positions[part] for each, part in self._parts(first, last)]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def first_visits(self, first: int, last: int) -> npt.NDArray[np.bool_]:
        """Return whether each of these samples is in the first pass over its source."""
        parts = [each.first_visits[part] for each, part in self._parts(first, last)]
        return np.concatenate(parts) if parts else np.empty(0, np.bool_)

    def _parts(self, first: int, last: int) -> Iterator[tuple[_Round, slice]]:
        """Yield the rounds with samples ``first`` to ``last`` (excluded), and the part in each."""
        number = self._round_of(first)
        while first < last:
            found = self._round(number)
            yield found, slice(first - found.begin, last - found.begin)
            first = found.begin + len(found.positions)
            number += 1

    def taken(self, count: int) -> list[int]:
        """Return the number of samples of each source among the first ``count`` samples, shape
        [sources]."""
        taken = [0] * self._sources
        if not count:
            return taken
        number = self._round_of(count - 1)
        found = self._round(number)
        within = np.bincount(found.sources[: count - found.begin], minlength=len(self._used))
        for i, before, more in zip(self._used, self._before(number), within, strict=True):
            taken[i] = before + int(more)
        return taken

    def _before(self, number: int) -> list[int]:
        """Return the number of samples of each used line in the rounds before this one."""
        return [
            line.samples_before(base + number * budget) - first
            for line, base, budget, first in zip(
                self._lines, self._base, self._budgets, self._first, strict=True
            )
        ]

    def _round_of(self, sample: int) -> int:
        """Return the round that contains a sample of the mixture."""
        # A first guess by whole passes, off by at most the last, partial pass of each line.
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

    def _make_round(self, number: int) -> _Round:
        firsts, lasts = self._before(number), self._before(number + 1)
        positions, times, sources, first_visits = [], [], [], []
        for i, line in enumerate(self._lines):
            first, last = self._first[i] + firsts[i], self._first[i] + lasts[i]
            found, middles = line.slice(first, last)
            positions.append(found)
            times.append((middles - self._base[i]) / self._budgets[i])
            sources.append(np.full(len(found), i))
            first_visits.append(np.arange(first, last) < line.samples)
        # Stable: at equal times the earlier source is first. Fast, as the parts are sorted.
        order = np.argsort(np.concatenate(times), kind="stable")
        columns = [np.concatenate(column)[order] for column in (positions, sources, first_visits)]
        return _Round(sum(firsts), *columns)


@dataclass(frozen=True)
class Stage:
    """A part of the training with its own mixture."""

    steps: int
    """Number of steps."""
    shares: Sequence[float] | None = None
    """Shares of the tokens, by source; None: in proportion to size."""
    name: str | None = None
    """Name in ``data.stages``; None: the training has no stages."""


class Curriculum:
    """The samples of every step, stage after stage. Each stage continues reading the sources where
    the previous stage stopped.

    Args:
        sources: source index of each sample of the index, shape [n].
        lengths: tokens of each sample, shape [n].
        count: number of sources; each has at least one sample.
        stages: stages in order, at least one; the last one never ends.
        batch: samples per step.
        seed: seed of the sample order.
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
        """Return the index positions of the samples of a step, in order, shape [batch]."""
        stage = self.stage_of(step)
        within = (step - int(self._begins[stage])) * self._batch
        return self._mixture(stage).samples(within, within + self._batch)

    def first_visits(self, step: int) -> npt.NDArray[np.bool_]:
        """Return whether no step before has each sample of a step, nor this one before it; shape
        [batch]."""
        stage = self.stage_of(step)
        within = (step - int(self._begins[stage])) * self._batch
        return self._mixture(stage).first_visits(within, within + self._batch)

    def stage_of(self, step: int) -> int:
        """Return the index of the stage of a step."""
        return int(np.searchsorted(self._begins, step, side="right")) - 1

    def name_of(self, step: int) -> str | None:
        """Return the name of the stage of a step; None: stages have no names."""
        return self._stages[self.stage_of(step)].name

    def _make_mixture(self, stage: int) -> Mixture:
        shares, first = self._stages[stage].shares, self._first(stage)
        if shares is None:
            return Mixture.in_proportion(self._lines, first)
        return Mixture(self._lines, shares, first)

    def _make_first(self, stage: int) -> tuple[int, ...]:
        """Return the number of samples of each source in the stages before this one."""
        if not stage:
            return (0,) * len(self._lines)
        before = stage - 1
        taken = self._make_mixture(before).taken(self._stages[before].steps * self._batch)
        return tuple(a + b for a, b in zip(self._first(before), taken, strict=True))
