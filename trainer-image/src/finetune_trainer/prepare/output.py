"""Where samples go: a writer for each side of the split, a report for each source, one manifest."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from finetune_api.sources import Format, Quality
from finetune_trainer.prepare.digest import Source
from finetune_trainer.prepare.faults import Faults
from finetune_trainer.prepare.page import render
from finetune_trainer.prepare.report import Contamination, SideReport, SourceReport
from finetune_trainer.prepare.tokens import Sample
from finetune_trainer.prepare.writer import SplitWriter, WrittenShard
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
        scratch.mkdir(parents=True, exist_ok=True)
        self._store, self._uri, self._digest, self._scratch = store, uri, digest, scratch
        self._writers = {side: SplitWriter(store, uri, scratch, side) for side in SIDES}
        self._reports: list[SourceReport] = []
        self._sets: list[tuple[Side, SourceReport]] = []
        self._stops: set[int] = set()
        self.contamination: Contamination | None = None
        """What the comparison with the held-out samples found, if there was one."""

    def begin(self, source: Source, form: Format, faults: Faults) -> SourceReport:
        """The samples that follow are of this source; returns its report, for counts of what is
        not added."""
        size = sum(o.size for o in source.objects)
        self._reports.append(SourceReport(source.name, form, len(source.objects), size, faults))
        return self._reports[-1]

    def add(self, sample: Sample, side: Side, *, stops: bool) -> None:
        """Count and write a sample; ``stops``: its last token ends an answer."""
        report = self._reports[-1]
        if side not in report.sides:
            self._writers[side].begin_set(len(self._sets), report.name)
            self._sets.append((side, report))
            report.sides[side] = SideReport()
        report.sides[side].add(sample)
        self._writers[side].add(sample)
        if stops:
            self._stops.add(int(sample.ids[-1]))

    def samples(self, side: Side) -> int:
        """Samples added to a side."""
        return sum(report.sides[s].samples for s, report in self._sets if s == side)

    def dropped(self) -> dict[str, int]:
        """Records left out so far, by cause."""
        causes: Counter[str] = Counter()
        for report in self._reports:
            causes.update(report.dropped)
        return {cause: count for cause, count in causes.items() if count}

    def shards(self, side: Side) -> Iterator[WrittenShard]:
        """Tokens of all samples added to a side."""
        return self._writers[side].written()

    def places(self, positions: Collection[int]) -> dict[int, str]:
        """Object and line of training samples, by position."""
        return self._writers["train"].places(positions)

    def report_of(self, number: int) -> SourceReport:
        """The report of the source of a set."""
        return self._sets[number][1]

    def leave_out(self, found: Contamination) -> None:
        """Take contaminated samples out of the training index and of the counts."""
        for number, positions in found.sets.items():
            self.report_of(number).contaminated = len(positions)
        every = [(number, p) for number, positions in found.sets.items() for p in positions]
        sizes = self._writers["train"].leave_out([p for _, p in every])
        for (number, _), length, supervised in zip(every, *sizes, strict=True):
            self.report_of(number).sides["train"].remove(length, supervised)

    def finish(self, max_length: int, quality: Quality) -> DataManifest:
        """Write what waits, the report and, last, the manifest.

        Args:
            quality: what was asked for, for the report.
        """
        for writer in self._writers.values():
            writer.close()
        files = [file for writer in self._writers.values() for file in writer.files]
        report = self._report(max_length, quality)
        text = json.dumps(report, ensure_ascii=False, indent=1) + "\n"
        files += [self._write("report.json", text), self._write("report.html", render(report))]
        train = [report.sides[side] for side, report in self._sets if side == "train"]
        manifest = DataManifest(
            version=FORMAT_VERSION,
            digest=self._digest,
            sets=[_entry(side, report) for side, report in self._sets],
            shards={side: self._writers[side].shards for side in SIDES},
            max_length=max_length,
            max_completion_tokens=max(side.longest_completion for side in train),
            stop_token_ids=sorted(self._stops),
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
    return DataSet(
        split=side,
        name=report.name,
        format=report.format,
        samples=found.samples,
        tokens=found.tokens,
        supervised=found.supervised,
    )
