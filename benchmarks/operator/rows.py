"""The table of loads in which jobs are created."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from measured import Figures
from observer import Observer

HEAD = (
    f"{'':6}{'first child p50, p99':>22}{'whole gang p50, p99':>21}{'last whole':>12}"
    f"{'writes/job':>12}{'passes/job':>12}{'CPU s':>8}{'RSS peak':>10}"
)


@dataclass(frozen=True)
class Row:
    """One subject under one load."""

    title: str
    first: list[float]
    """Seconds from the request to create a job to its first child Job."""
    whole: list[float]
    """Seconds from the request to create a job to its whole gang."""
    last: float
    """Seconds from the first request to the last whole gang."""
    count: int
    figures: Figures | None
    writes: Counter[str]

    @classmethod
    def of(
        cls,
        title: str,
        seen: Observer,
        count: int,
        figures: Figures | None,
        writes: Counter[str] | None = None,
    ) -> Row:
        asked = seen.asked
        return cls(
            title,
            sorted(seen.first[n] - asked[n] for n in seen.first),
            sorted(seen.whole[n] - asked[n] for n in seen.whole),
            max(seen.whole.values(), default=0.0) - min(asked.values()),
            count,
            figures,
            figures.writes if figures else writes or Counter(),
        )

    def __str__(self) -> str:
        found = self.figures
        text = f"{self.title:6}{_quantiles(self.first):>22}{_quantiles(self.whole):>21}"
        text += f"{self.last:10.1f} s{self.writes.total() / self.count:12.2f}"
        if found is not None:
            text += f"{found.passes / self.count:12.1f}{found.cpu:8.1f}{found.peak:6.0f} MiB"
        if len(self.whole) < self.count:
            text += f"\n      only {len(self.whole)} of {self.count} gangs are whole"
        by_kind = {kind: round(n / self.count, 2) for kind, n in self.writes.most_common()}
        return f"{text}\n      writes a job: {by_kind}"


def _quantiles(seconds: Collection[float]) -> str:
    if not seconds:
        return "none"
    ordered = sorted(seconds)
    return f"{_at(ordered, 0.5):.2f} s, {_at(ordered, 0.99):.2f} s"


def _at(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]
