"""Collects and writes the output of the reduce: an index per side of the split, a report per
source, one manifest."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetune_api.sources import BUILT_IN, Quality
from finetune_api.tasks import MOST_LABELS
from finetune_trainer.prepare.mapping.statistics import SampleStatistics, SplitSummary
from finetune_trainer.prepare.reading.faults import Faults
from finetune_trainer.prepare.reading.sources import Source
from finetune_trainer.prepare.reducing.indexes import IndexedShard, IndexWriter
from finetune_trainer.prepare.reducing.page import render
from finetune_trainer.prepare.reducing.report import Contamination, Rows, SideReport, SourceReport
from finetune_trainer.prepare.reducing.slices import SliceValues
from finetune_trainer.prepare.tokenizing.tokens import CUTS
from finetune_trainer.prepared.manifest import (
    FORMAT_VERSION,
    DataFile,
    DataManifest,
    DataSet,
    write_manifest,
)
from finetune_trainer.prepared.slices import SLICES
from finetune_trainer.prepared.split import HELD_OUT, SIDES, Side
from finetune_trainer.storage.objects import ObjectStore


class Output:
    """Writer of the prepared data.

    Args:
        store: storage of the prepared data.
        uri: prefix of the prepared data.
        digest: content digest.
        scratch: local folder for temporary files.
        slices: fields of ``evaluation.slices``.
    """

    def __init__(
        self, store: ObjectStore, uri: str, digest: str, scratch: Path, slices: Sequence[str]
    ) -> None:
        self._store, self._uri, self._digest, self._scratch = store, uri, digest, scratch
        self._indexes = {side: IndexWriter(store, uri, scratch, side) for side in SIDES}
        self._slices = SliceValues(slices)
        self._reports: list[SourceReport] = []
        self._sets: list[tuple[Side, SourceReport]] = []
        self._stops: set[int] = set()
        self._numbers = dict.fromkeys(SIDES, 0)
        self.contamination: Contamination | None = None
        """Contaminated training samples; None without a comparison with held-out samples."""

    def begin(self, source: Source, policy: str) -> SourceReport:
        """Begin a source; return its report.

        Args:
            policy: ``data.quality.faultyRecords``.
        """
        size = sum(o.size for o in source.objects)
        report = SourceReport(
            source.name,
            len(source.objects),
            size,
            Faults(policy),
            built_in=source.spec.source == BUILT_IN,
        )
        self._reports.append(report)
        return report

    def begin_split(self, summary: SplitSummary) -> None:
        """Begin an input split of the source."""
        self._reports[-1].merge(summary)
        if self.contamination is not None and summary.compared is not None:
            self.contamination.compared = summary.compared
        self._numbers = dict.fromkeys(SIDES, 0)
        for side, index in self._indexes.items():
            index.begin_split(summary.shards[side])

    def add(self, statistics: SampleStatistics, kept: Rows, summary: SplitSummary) -> None:
        """Count and index the samples of an input split at the rows ``kept`` of its statistics."""
        report = self._reports[-1]
        sides = statistics.numbers("side")
        numbers = self._numbered(sides)
        for number in dict.fromkeys(sides[kept].tolist()):
            side, rows = SIDES[number], kept[sides[kept] == number]
            if side not in report.sides:
                self._sets.append((side, report))
                report.sides[side] = SideReport()
                self._indexes[side].begin_set(len(self._sets) - 1)
            if side == "train" and self.contamination is not None:
                self._add_contaminated(self.contamination, statistics, rows)
            report.sides[side].add(statistics, rows)
            offered = summary.previews.get(side, ())
            report.sides[side].show(offered, rows + statistics.first)
            self._indexes[side].add(statistics, rows, numbers[rows])
            if side == "test" and self._slices.fields:
                self._slices.add(len(self._sets) - 1, statistics.texts("slices", rows))
        report.cuts.update(CUTS[i] for i in statistics.numbers("cut")[kept].tolist())
        self._stops.update(set(statistics.numbers("stop")[kept].tolist()) - {-1})

    def _numbered(self, sides: Rows) -> Rows:
        """The number of each row among the input split's samples of the same side."""
        numbers = np.empty(len(sides), np.int64)
        for position, side in enumerate(SIDES):
            rows = np.flatnonzero(sides == position)
            numbers[rows] = self._numbers[side] + np.arange(len(rows))
            self._numbers[side] += len(rows)
        return numbers

    def _add_contaminated(
        self, found: Contamination, statistics: SampleStatistics, rows: Rows
    ) -> None:
        """Record the training samples that map found contaminated."""
        sharing = statistics.having("shared", rows)
        first, number = self.samples("train"), len(self._sets) - 1
        positions = first + np.searchsorted(rows, sharing)
        for position, text in zip(
            positions.tolist(), statistics.texts("shared", sharing), strict=True
        ):
            found.add(number, position, text)

    def samples(self, side: Side) -> int:
        """Number of samples added to a side."""
        return sum(report.sides[s].samples for s, report in self._sets if s == side)

    def dropped(self) -> dict[str, int]:
        """Number of records dropped so far, by cause."""
        causes: Counter[str] = Counter()
        for report in self._reports:
            causes.update(report.dropped)
        return {cause: count for cause, count in causes.items() if count}

    def indexed_shards(self, side: Side) -> Iterator[IndexedShard]:
        """Download and yield the shards of all samples added to a side."""
        return self._indexes[side].indexed_shards()

    def places(self, positions: Collection[int]) -> dict[int, str]:
        """Object and line of training samples, by position."""
        return self._indexes["train"].places(positions)

    def report_of(self, number: int) -> SourceReport:
        """The report of the source of a set."""
        return self._sets[number][1]

    def leave_out(self, found: Contamination) -> None:
        """Remove contaminated samples from the training index and from the counts."""
        for number, positions in found.sets.items():
            report = self.report_of(number)
            report.contaminated = len(positions)
            removed = self._indexes["train"].leave_out(np.array(positions))
            report.sides["train"].remove(*removed)

    def finish(
        self,
        max_length: int,
        quality: Quality,
        classes_of: Callable[[Iterable[tuple[Side, SideReport]]], list[str]],
    ) -> DataManifest:
        """Write the indexes, the report and, last, the manifest.

        Args:
            quality: settings shown in the report.
            classes_of: returns the names of the classes, from the reports of all sets.
        """
        classes = classes_of((side, report.sides[side]) for side, report in self._sets)
        files = [f for index in self._indexes.values() for f in (*index.files, index.finish())]
        report = self._report(max_length, quality)
        text = json.dumps(report, ensure_ascii=False, indent=1) + "\n"
        files += [self._write("report.json", text), self._write("report.html", render(report))]
        if self._slices.fields:
            self._slices.write(self._scratch / SLICES)
            files.append(self._upload(SLICES))
        trained = any(side == "train" for side, _ in self._sets)
        answered = [
            report.sides[side] for side, report in self._sets if side == "train" or not trained
        ]
        manifest = DataManifest(
            version=FORMAT_VERSION,
            digest=self._digest,
            sets=[_entry(side, report, self._labels(report.name)) for side, report in self._sets],
            shards={side: [f.name for f in self._indexes[side].shards] for side in SIDES},
            max_length=max_length,
            max_completion_tokens=max(side.longest_completion for side in answered),
            stop_token_ids=sorted(self._stops),
            classes=classes,
            dropped=self.dropped(),
            files=files,
        )
        write_manifest(self._store, self._uri, manifest)
        return manifest

    def _labels(self, name: str) -> dict[str, list[int]]:
        """Labels of all samples of this name on any side, with their tokens; none if they are too
        many."""
        found: dict[str, str] = {}
        for side, report in self._sets:
            if report.name == name:
                found = report.sides[side].label_tokens | found
        if len(found) > MOST_LABELS:
            return {}
        return {label: json.loads(found[label]) for label in sorted(found)}

    def _report(self, max_length: int, quality: Quality) -> dict[str, Any]:
        names = {number: report.name for number, (_, report) in enumerate(self._sets)}
        held_out = sum(map(self.samples, HELD_OUT))
        return {
            "digest": self._digest,
            "quality": quality.to_json(),
            "maxLength": max_length,
            "sources": [r.to_json() for r in self._reports],
            "contamination": self.contamination and self.contamination.to_json(names, held_out),
        }

    def _write(self, name: str, text: str) -> DataFile:
        path = self._scratch / name
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
        return self._upload(name)

    def _upload(self, name: str) -> DataFile:
        info = self._store.upload(self._scratch / name, f"{self._uri}/{name}")
        return DataFile(name=name, bytes=info.bytes, sha256=info.sha256)


def _entry(side: Side, report: SourceReport, labels: dict[str, list[int]]) -> DataSet:
    found = report.sides[side]
    assert report.format is not None, "a source with samples has a format"
    return DataSet(
        split=side,
        name=report.name,
        format=report.format,
        built_in=report.built_in,
        samples=found.samples,
        tokens=found.tokens,
        supervised=found.supervised,
        labels=labels,
    )
