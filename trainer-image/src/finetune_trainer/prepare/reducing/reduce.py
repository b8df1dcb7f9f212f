"""Reduce: turns the sample statistics of all input splits into index, report and manifest.

    statistics, in the order of the data ─(duplicates)→ indexes, counts
        → (contamination) → index, report → manifest

Memory holds one batch of rows, and with duplicate detection the digests and fingerprints of every
training sample (see ``duplicates`` and ``nearduplicates``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from finetune_api.sources import Data
from finetune_trainer.failures import DataError
from finetune_trainer.prepare.mapping.map import RunPaths, compared_in_map
from finetune_trainer.prepare.mapping.pool import Pool
from finetune_trainer.prepare.reading.inputsplits import InputSplit
from finetune_trainer.prepare.reading.sources import Source
from finetune_trainer.prepare.reducing import contaminated
from finetune_trainer.prepare.reducing.deduplicate import Deduplicator
from finetune_trainer.prepare.reducing.output import Output
from finetune_trainer.prepare.reducing.report import Contamination, SourceReport
from finetune_trainer.prepared.split import HELD_OUT

log = logging.getLogger(__name__)


def reduce_splits(
    data: Data,
    sources: Sequence[Source],
    splits: Sequence[InputSplit],
    pool: Pool,
    paths: RunPaths,
    decode: Callable[[Any], str],
    slices: Sequence[str],
) -> Output:
    """Decide which samples of all input splits to keep.

    Args:
        decode: converts token ids to text.
        slices: fields of ``evaluation.slices``.

    Raises:
        DataError: the first fault in the order of the data; 'EmptyDataSet', with the set;
            'MostRecordsFaulty', 'TooManyDuplicates', 'Contaminated'.
    """
    results, quality = paths.results, data.quality
    results.check()
    output = Output(paths.store, paths.uri, paths.digest, paths.scratch, slices)
    if compared_in_map(data):
        output.contamination = Contamination(quality.contamination, 0)
    duplicates = Deduplicator(quality)
    for number, source in enumerate(sources):
        report = output.begin(source, quality.faulty_records)
        for split in (s for s in splits if s.source == number):
            summary = results.summary(split)
            output.begin_split(summary)
            duplicates.begin_split(summary)
            for statistics in results.statistics(split, paths.scratch):
                training = source.side == "train"
                rows = np.arange(len(statistics))
                kept = duplicates.fresh(statistics, report) if training else rows
                output.add(statistics, kept, summary)
        _check_source(source, report, data)
    duplicates.check()
    if data.train is not None and not output.samples("train"):
        raise _empty("train", _where_training_went(output))
    compares = data.train is not None and quality.contamination != "Ignore"
    if compares and output.contamination is None:
        contaminated.compare(output, quality.contamination, pool, decode, paths.scratch)
    contaminated.act(output)
    return output


def _check_source(source: Source, report: SourceReport, data: Data) -> None:
    """Check that a source has usable records, and log personal data found in it."""
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
    held = sum(map(output.samples, HELD_OUT))
    dropped = ", ".join(f"{cause} {n}" for cause, n in output.dropped().items() if n)
    return f"no record is left to train on (held out: {held}; left out: {dropped or 'none'})"
