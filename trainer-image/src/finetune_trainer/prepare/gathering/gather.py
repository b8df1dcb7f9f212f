"""From the facts of all parts to index, report and manifest: the verdicts over the whole data.

parts, in the order of the data ─(duplicates)→ indexes, counts → index, without what shares text
with held-out samples

Memory holds some rows, and what is remembered of every training sample where duplicates are looked
for (see ``duplicates`` and ``nearduplicates``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetune_api.sources import Data
from finetune_trainer.failures import DataError
from finetune_trainer.prepare.gathering.deduplicate import Deduplicator
from finetune_trainer.prepare.gathering.heldout import compare
from finetune_trainer.prepare.gathering.output import Output
from finetune_trainer.prepare.gathering.report import SourceReport
from finetune_trainer.prepare.meeting import Meeting
from finetune_trainer.prepare.reading.parts import Part
from finetune_trainer.prepare.reading.sources import Source

log = logging.getLogger(__name__)


def gather(
    data: Data,
    sources: Sequence[Source],
    parts: Sequence[Part],
    meeting: Meeting,
    output: Output,
    scratch: Path,
    *,
    meanwhile: Callable[[], None],
    decode: Callable[[Any], str],
) -> None:
    """Judge the samples of all parts as they are done, and fill the output.

    Args:
        meanwhile: is called now and then while a part is waited for.
        decode: text of token ids.

    Raises:
        DataError: the first fault in the order of the data; 'EmptyDataSet' naming the set;
            'MostRecordsFaulty', 'TooManyDuplicates', 'Contaminated'.
    """
    duplicates = Deduplicator(data.quality)
    for number, source in enumerate(sources):
        report = output.begin(source, data.quality.faulty_records)
        for part in (p for p in parts if p.source == number):
            said = meeting.wait(part, meanwhile)
            output.begin_part(said)
            duplicates.begin_part(said)
            for facts in meeting.facts(part, scratch):
                training = source.side == "train"
                kept = duplicates.fresh(facts, report) if training else np.arange(len(facts))
                output.add(facts, kept, said)
        _check_source(source, report, data)
    duplicates.check()
    if not output.samples("train"):
        raise _empty("train", _where_training_went(output))
    compare(output, data.quality.contamination, decode, scratch)


def _check_source(source: Source, report: SourceReport, data: Data) -> None:
    """Whether a source held what it was given for."""
    report.faults.check(source.name, report.records)
    if not report.records:
        raise DataError(
            "EmptyDataSet",
            f"data set {source.name!r} is empty: {source.spec.source} matches"
            f" {len(source.objects)} objects, but they hold no record; correct the data source",
        )
    for side, found in report.sides.items():
        if found.personal and data.quality.personal_data == "Warn":
            counts = ", ".join(f"{kind} {n.occurrences}" for kind, n in found.personal.items())
            log.warning(
                "data set %s holds personal data (%s: %s; first at %s), see its report",
                report.name, side, counts, next(iter(found.personal.values())).places[0],
            )  # fmt: skip
    if source.side != "train" and not report.sides:
        why = ", ".join(f"{cause} {n}" for cause, n in report.dropped.items() if n)
        raise _empty(source.name, f"all {report.records} records were left out ({why})")


def _empty(name: str, why: str) -> DataError:
    return DataError("EmptyDataSet", f"data set {name!r} is empty: {why}; correct data or spec")


def _where_training_went(output: Output) -> str:
    held = output.samples("validation") + output.samples("test")
    dropped = ", ".join(f"{cause} {n}" for cause, n in output.dropped().items() if n)
    return f"no record is left to train on (held out: {held}; left out: {dropped or 'none'})"
