"""Where samples go once they are judged: an index for each side of the split, a report for each
source, one manifest."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from finetune_api.sources import Quality
from finetune_trainer.prepare.gathering.indexes import IndexedSamples, IndexWriter
from finetune_trainer.prepare.gathering.page import render
from finetune_trainer.prepare.gathering.report import Contamination, Rows, SideReport, SourceReport
from finetune_trainer.prepare.mapping.facts import Facts, PartSummary
from finetune_trainer.prepare.reading.faults import Faults
from finetune_trainer.prepare.reading.sources import Source
from finetune_trainer.prepare.tokenizing.overlength import CUTS
from finetune_trainer.prepared.manifest import (
    FORMAT_VERSION,
    DataFile,
    DataManifest,
    DataSet,
    write_manifest,
)
from finetune_trainer.prepared.split import SIDES, Side
from finetune_trainer.storage.objects import ObjectStore


class Output:
    """The prepared data that is being written.

    Args:
        store: where it goes.
        uri: its prefix.
        digest: its content digest.
        scratch: folder for files on their way.
    """

    def __init__(self, store: ObjectStore, uri: str, digest: str, scratch: Path) -> None:
        self._store, self._uri, self._digest, self._scratch = store, uri, digest, scratch
        self._indexes = {side: IndexWriter(store, uri, scratch, side) for side in SIDES}
        self._reports: list[SourceReport] = []
        self._sets: list[tuple[Side, SourceReport]] = []
        self._stops: set[int] = set()
        self.contamination: Contamination | None = None
        """What the comparison with the held-out samples found, if there was one."""

    def begin(self, source: Source, policy: str) -> SourceReport:
        """The parts that follow are of this source; returns its report.

        Args:
            policy: ``data.quality.faultyRecords``.
        """
        size = sum(o.size for o in source.objects)
        report = SourceReport(source.name, len(source.objects), size, Faults(policy))
        self._reports.append(report)
        return report

    def begin_part(self, part: PartSummary) -> None:
        """The samples that follow are of this part."""
        self._reports[-1].merge(part)
        for side, index in self._indexes.items():
            index.begin_part(part.shards[side])

    def add(self, facts: Facts, kept: Rows, part: PartSummary) -> None:
        """Count and index samples of a part: those rows of its facts."""
        report = self._reports[-1]
        sides = facts.numbers("side")[kept]
        for number in dict.fromkeys(sides.tolist()):
            side, rows = SIDES[number], kept[sides == number]
            if side not in report.sides:
                self._sets.append((side, report))
                report.sides[side] = SideReport()
                self._indexes[side].begin_set(len(self._sets) - 1)
            report.sides[side].add(facts, rows)
            report.sides[side].show(part.previews.get(side, ()), rows + facts.first)
            self._indexes[side].add(facts, rows)
        report.cuts.update(CUTS[i] for i in facts.numbers("cut")[kept].tolist())
        self._stops.update(set(facts.numbers("stop")[kept].tolist()) - {-1})

    def samples(self, side: Side) -> int:
        """Samples added to a side."""
        return sum(report.sides[s].samples for s, report in self._sets if s == side)

    def dropped(self) -> dict[str, int]:
        """Records left out so far, by cause."""
        causes: Counter[str] = Counter()
        for report in self._reports:
            causes.update(report.dropped)
        return {cause: count for cause, count in causes.items() if count}

    def tokens(self, side: Side) -> Iterator[IndexedSamples]:
        """Tokens of all samples added to a side."""
        return self._indexes[side].samples()

    def places(self, positions: Collection[int]) -> dict[int, str]:
        """Object and line of training samples, by position."""
        return self._indexes["train"].places(positions)

    def report_of(self, number: int) -> SourceReport:
        """The report of the source of a set."""
        return self._sets[number][1]

    def leave_out(self, found: Contamination) -> None:
        """Take contaminated samples out of the training index and of the counts."""
        for number, positions in found.sets.items():
            report = self.report_of(number)
            report.contaminated = len(positions)
            report.sides["train"].remove(*self._indexes["train"].leave_out(positions))

    def finish(
        self,
        max_length: int,
        quality: Quality,
        classes_of: Callable[[Iterable[tuple[Side, SideReport]]], list[str]],
    ) -> DataManifest:
        """Write the indexes, the report and, last, the manifest.

        Args:
            quality: what was asked for, for the report.
            classes_of: names of the classes, from what was found in each set.
        """
        classes = classes_of((side, report.sides[side]) for side, report in self._sets)
        files = [f for index in self._indexes.values() for f in (*index.shards, index.finish())]
        report = self._report(max_length, quality)
        text = json.dumps(report, ensure_ascii=False, indent=1) + "\n"
        files += [self._write("report.json", text), self._write("report.html", render(report))]
        train = [report.sides[side] for side, report in self._sets if side == "train"]
        manifest = DataManifest(
            version=FORMAT_VERSION,
            digest=self._digest,
            sets=[_entry(side, report) for side, report in self._sets],
            shards={side: [f.name for f in self._indexes[side].shards] for side in SIDES},
            max_length=max_length,
            max_completion_tokens=max(side.longest_completion for side in train),
            stop_token_ids=sorted(self._stops),
            classes=classes,
            dropped=self.dropped(),
            files=files,
        )
        write_manifest(self._store, self._uri, manifest)
        return manifest

    def _report(self, max_length: int, quality: Quality) -> dict[str, Any]:
        names = {number: report.name for number, (_, report) in enumerate(self._sets)}
        return {
            "digest": self._digest,
            "quality": quality.to_json(),
            "maxLength": max_length,
            "sources": [r.to_json() for r in self._reports],
            "contamination": self.contamination and self.contamination.to_json(names),
        }

    def _write(self, name: str, text: str) -> DataFile:
        path = self._scratch / name
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
        info = self._store.upload(path, f"{self._uri}/{name}")
        return DataFile(name=name, bytes=info.bytes, sha256=info.sha256)


def _entry(side: Side, report: SourceReport) -> DataSet:
    found = report.sides[side]
    assert report.format is not None, "a source with samples has a format"
    return DataSet(
        split=side,
        name=report.name,
        format=report.format,
        samples=found.samples,
        tokens=found.tokens,
        supervised=found.supervised,
    )
