"""``report.json``: what was found in the data, for people who decide whether to trust it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from finetune_api.sources import Format
from finetune_trainer.prepare.contamination import NGRAM
from finetune_trainer.prepare.faults import Faults
from finetune_trainer.prepare.languages import Languages
from finetune_trainer.prepare.overlength import Cut
from finetune_trainer.prepare.personal import scan
from finetune_trainer.prepare.tokens import Sample
from finetune_trainer.prepared.split import Side

PREVIEWS: Final = 3
"""Samples of each set and side that the report shows."""

PLACES: Final = 5
"""Places that the report names of what was found."""

PREVIEW_CHARACTERS: Final = 2000
LABELS_SHOWN: Final = 200
BINS: Final = 24
"""Most bins of a histogram."""

_PERCENTILES: Final = (0, 10, 50, 90, 99, 100)


@dataclass
class Found:
    """How often something was found, and where at first; never the thing itself."""

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
    """Samples of one source on one side. Lengths are counted, not listed, so that memory does not
    grow with the data."""

    samples: int = 0
    tokens: int = 0
    supervised: int = 0
    longest_completion: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    personal: dict[str, Found] = field(default_factory=dict)
    previews: list[dict[str, Any]] = field(default_factory=list)

    def add(self, sample: Sample) -> None:
        """Count a sample."""
        length = len(sample.ids)
        self.samples += 1
        self.tokens += length
        self.supervised += sample.supervised
        self.longest_completion = max(self.longest_completion, length - sample.prompt_length)
        self.lengths[length] += 1
        if sample.draft.label is not None:
            self.labels[sample.draft.label] += 1
        for kind, count in sample.draft.personal.items():
            self.personal.setdefault(kind, Found()).add(sample.draft.where, count)
        if len(self.previews) < PREVIEWS:
            self.previews.append(_preview(sample))

    def remove(self, length: int, supervised: int) -> None:
        """Count a sample no longer. Its label and its place among the longest stay counted: they
        are known no more."""
        self.samples -= 1
        self.tokens -= length
        self.supervised -= supervised
        self.lengths[length] -= 1

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
    """One data source."""

    name: str
    format: Format
    objects: int
    bytes: int
    faults: Faults
    records: int = 0
    duplicates: int = 0
    near_duplicates: int = 0
    contaminated: int = 0
    languages: Languages = field(default_factory=Languages)
    cuts: Counter[Cut] = field(default_factory=Counter)
    sides: dict[Side, SideReport] = field(default_factory=dict)

    @property
    def dropped(self) -> dict[str, int]:
        """Records left out, by cause."""
        return {
            "Duplicate": self.duplicates,
            "NearDuplicate": self.near_duplicates,
            "Overlength": self.cuts["Dropped"],
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
            "languages": self.languages.to_json(),
            "truncated": {
                "promptBeginning": self.cuts["Prompt"],
                "completionEnd": self.cuts["Completion"],
            },
            "splits": {side: report.to_json() for side, report in self.sides.items()},
        }


@dataclass
class Contamination:
    """Training samples that share text with held-out ones."""

    held_out: int
    """Held-out samples."""
    compared: int
    """Held-out samples that were compared."""
    policy: str
    sets: dict[int, list[int]] = field(default_factory=dict)
    """Positions in the training index, by the number of the set."""
    examples: dict[int, str] = field(default_factory=dict)
    """Shared text of the first few of each set, by position."""
    places: dict[int, str] = field(default_factory=dict)
    """Object and line of these."""

    def to_json(self, names: Mapping[int, str]) -> dict[str, Any]:
        return {
            "ngram": NGRAM,
            "heldOutSamples": self.held_out,
            "comparedSamples": self.compared,
            "policy": self.policy,
            "sets": {
                names[number]: {
                    "samples": len(positions),
                    "examples": [
                        {"where": self.places[p], "shared": self.examples[p]}
                        for p in positions
                        if p in self.examples
                    ],
                }
                for number, positions in self.sets.items()
            },
        }


def histogram(counts: Counter[int]) -> list[dict[str, int]]:
    """Counted values in at most ``BINS`` equal bins, whose width is a power of two:
    ``[{"from": 1, "to": 16, "samples": 5}, …]``; both bounds belong to the bin."""
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
    """Exact percentiles (nearest rank) of counted values: ``{"p50": 17, …}``."""
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


def _preview(sample: Sample) -> dict[str, Any]:
    """A sample to look at. More people read the report than the data: personal data is masked
    whatever is done about it in the samples."""
    parts: list[dict[str, Any]] = []
    room = PREVIEW_CHARACTERS
    for part in sample.draft.parts:
        text, _ = scan(part.text)
        parts.append({"text": text[:room], "learned": part.learned})
        room = max(0, room - len(text))
    return {"where": sample.draft.where, "tokens": len(sample.ids), "parts": parts}
