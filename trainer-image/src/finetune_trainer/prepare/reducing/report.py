"""``report.json``: the data quality report for the user."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from finetune_api.sources import Format
from finetune_trainer.failures import DataError
from finetune_trainer.prepare.mapping.statistics import Preview, SampleStatistics, SplitSummary
from finetune_trainer.prepare.quality.contamination import NGRAM
from finetune_trainer.prepare.reading.faults import Faults
from finetune_trainer.prepare.tokenizing.tokens import Cut
from finetune_trainer.prepared.split import Side

PREVIEWS: Final = 3
"""Samples shown per set and side."""

PLACES: Final = 5
"""Places shown per finding."""

LABELS_SHOWN: Final = 200
BINS: Final = 24
"""Maximum bins of a histogram."""

Rows = npt.NDArray[Any]
"""An integer array: rows of statistics, positions in an index, or values of a column."""

_PERCENTILES: Final = (0, 10, 50, 90, 99, 100)


@dataclass
class Found:
    """Counts and first places of a kind of personal data; never its values."""

    samples: int = 0
    occurrences: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, where: str, occurrences: int) -> None:
        """Count a sample."""
        self.samples += 1
        self.occurrences += occurrences
        if len(self.places) < PLACES and where not in self.places:
            self.places.append(where)

    def to_json(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "occurrences": self.occurrences,
            "places": self.places,
        }


@dataclass
class SideReport:
    """Samples of one source on one side. Lengths are kept as counts, so that memory does not grow
    with the data."""

    samples: int = 0
    tokens: int = 0
    supervised: int = 0
    longest_completion: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    label_places: dict[str, str] = field(default_factory=dict)
    """Object and line of the first sample with each label."""
    label_tokens: dict[str, str] = field(default_factory=dict)
    """Tokens of each label as JSON, with the end token, in the first sample that has them all."""
    personal: dict[str, Found] = field(default_factory=dict)
    previews: list[dict[str, Any]] = field(default_factory=list)

    def add(self, statistics: SampleStatistics, rows: Rows) -> None:
        """Count samples."""
        length = statistics.numbers("length")[rows]
        self.samples += len(rows)
        self.tokens += int(length.sum())
        self.supervised += int(statistics.numbers("supervised")[rows].sum())
        longest = int(statistics.numbers("completion")[rows].max(initial=0))
        self.longest_completion = max(self.longest_completion, longest)
        self.lengths.update(_counted(length))
        labelled = statistics.having("label", rows)
        self.labels.update(statistics.texts("label", labelled))
        _add_first(self.label_places, "where", statistics, labelled)
        whole = statistics.having("label_tokens", labelled)
        _add_first(self.label_tokens, "label_tokens", statistics, whole)
        personal = statistics.having("personal", rows)
        texts = (statistics.texts(name, personal) for name in ("where", "personal"))
        for where, found in zip(*texts, strict=True):
            for kind, count in json.loads(found).items():
                self.personal.setdefault(kind, Found()).add(where, count)

    def show(self, offered: Iterable[Preview], samples: Rows) -> None:
        """Keep the previews of the first samples.

        Args:
            offered: previews of an input split.
            samples: rows of the split that were added; other previews are ignored.
        """
        shown = (p.shown for p in offered if len(self.previews) < PREVIEWS and p.sample in samples)
        self.previews.extend(shown)

    def remove(self, length: Rows, supervised: Rows) -> None:
        """Subtract samples from the counts, except from ``labels`` and ``longest_completion``: the
        index does not hold these values."""
        self.samples -= len(length)
        self.tokens -= int(length.sum())
        self.supervised -= int(supervised.sum())
        self.lengths.subtract(_counted(length))

    def to_json(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "tokens": self.tokens,
            "supervisedTokens": self.supervised,
            "supervisedShare": round(self.supervised / max(1, self.tokens), 4),
            "lengthPercentiles": percentiles(self.lengths),
            "lengthHistogram": histogram(self.lengths),
            "labels": dict(self.labels.most_common(LABELS_SHOWN)),
            "distinctLabels": len(self.labels),
            "personalData": {kind: found.to_json() for kind, found in self.personal.items()},
            "previews": self.previews,
        }


@dataclass
class SourceReport:
    """The report of one data source."""

    name: str
    objects: int
    bytes: int
    faults: Faults
    format: Format | None = None
    built_in: bool = False
    """Whether it is the set of verifiable instructions."""
    records: int = 0
    duplicates: int = 0
    near_duplicates: int = 0
    overlength: int = 0
    split: int = 0
    contaminated: int = 0
    languages: Counter[str] = field(default_factory=Counter)
    """Records with language identification, by language (ISO 639 code)."""
    cuts: Counter[Cut] = field(default_factory=Counter)
    sides: dict[Side, SideReport] = field(default_factory=dict)

    def merge(self, split: SplitSummary) -> None:
        """Add the counts of an input split."""
        self.format = self.format or split.format
        self.records += split.records
        self.overlength += split.overlength
        self.split += split.split
        self.faults.merge(split.reasons, [DataError(f.reason, f.message) for f in split.faults])
        self.languages.update(split.languages)

    @property
    def dropped(self) -> dict[str, int]:
        """Number of records dropped, by cause."""
        return {
            "Duplicate": self.duplicates,
            "NearDuplicate": self.near_duplicates,
            "Overlength": self.overlength,
            "Contaminated": self.contaminated,
            **self.faults.reasons,
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "format": self.format,
            "objects": self.objects,
            "bytes": self.bytes,
            "records": self.records,
            "dropped": self.dropped,
            "faults": self.faults.to_json(),
            "languages": shares(self.languages),
            "documentsSplit": self.split,
            "truncated": {
                "promptBeginning": self.cuts["Prompt"],
                "completionEnd": self.cuts["Completion"],
                "textEnd": self.cuts["Text"],
            },
            "splits": {side: report.to_json() for side, report in self.sides.items()},
        }


@dataclass
class Contamination:
    """Training samples that share text with held-out samples."""

    policy: str
    compared: int
    """Number of held-out samples compared."""
    sets: dict[int, array[int]] = field(default_factory=dict)
    """Positions in the training index, ascending, by set number."""
    examples: dict[int, str] = field(default_factory=dict)
    """Shared text of the first few of each set, by position."""
    places: dict[int, str] = field(default_factory=dict)
    """Object and line of these samples."""

    def enough(self, number: int) -> bool:
        """Whether a set has ``PLACES`` examples."""
        return len(self.sets.get(number, ())) >= PLACES

    def add(self, number: int, position: int, shared: str) -> None:
        """Add a sample.

        Args:
            number: of the set.
            position: in the training index, ascending between calls.
            shared: text that it shares.
        """
        if not self.enough(number):
            self.examples[position] = shared
        self.sets.setdefault(number, array("q")).append(position)

    def to_json(self, names: Mapping[int, str], held_out: int) -> dict[str, Any]:
        """Return the report entry.

        Args:
            names: of the sets, by number.
            held_out: number of held-out samples.
        """
        return {
            "ngram": NGRAM,
            "heldOutSamples": held_out,
            "comparedSamples": self.compared,
            "policy": self.policy,
            "sets": {
                names[number]: {
                    "samples": len(positions),
                    "examples": [
                        {"where": self.places[p], "shared": self.examples[p]}
                        for p in positions[:PLACES]
                    ],
                }
                for number, positions in self.sets.items()
            },
        }


def shares(counts: Counter[str]) -> dict[str, float]:
    """Return the share of each name, the largest first."""
    total = max(1, counts.total())
    return {name: round(n / total, 4) for name, n in counts.most_common()}


def histogram(counts: Counter[int]) -> list[dict[str, int]]:
    """Return the histogram of counted values, in at most ``BINS`` equal bins with a width that is a
    power of two: ``[{"from": 1, "to": 16, "samples": 5}, …]``; both bounds are inclusive."""
    longest = max((value for value, count in counts.items() if count), default=0)
    if not longest:
        return []
    width = 1
    while width * BINS < longest:
        width *= 2
    bins = [0] * (-(-longest // width))
    for value, count in counts.items():
        if count:
            bins[(value - 1) // width] += count
    return [
        {"from": i * width + 1, "to": (i + 1) * width, "samples": count}
        for i, count in enumerate(bins)
    ]


def percentiles(counts: Counter[int]) -> dict[str, int]:
    """Return exact percentiles (nearest rank) of counted values: ``{"p50": 17, …}``."""
    total, ordered = counts.total(), sorted(value for value, count in counts.items() if count)
    if not total:
        return {}
    found = {}
    for percent in _PERCENTILES:
        rank, passed = max(1, -(-percent * total // 100)), 0
        for value in ordered:
            passed += counts[value]
            if passed >= rank:
                found[f"p{percent}"] = value
                break
    return found


def _add_first(
    known: dict[str, str], column: str, statistics: SampleStatistics, rows: Rows
) -> None:
    """Add the value of a column in the first of some rows with each label that is not known."""
    labels = statistics.texts("label", rows)
    fresh = {label: labels.index(label) for label in set(labels) - known.keys()}
    if fresh:
        values = statistics.texts(column, rows[list(fresh.values())])
        known.update(zip(fresh, values, strict=True))


def _counted(values: Rows) -> dict[int, int]:
    found, counts = np.unique(values, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))
