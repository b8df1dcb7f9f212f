"""The test and retention sets of a run, with what each row answered to their samples.

answers/ (one file a row) + references of the samples ──► MeasuredSet
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finetune_api.evaluation_results import BASE, TUNED
from finetune_api.spec import FineTuneJobSpec
from finetune_api.tasks import METRICS, Kinds
from finetune_trainer.evaluate.data_curve import SHARES
from finetune_trainer.evaluate.metric_selection import measured_on
from finetune_trainer.evaluate.table import Answered
from finetune_trainer.evaluate.weighted_scores import Groups
from finetune_trainer.prepared.dataset import PreparedData, Reference
from finetune_trainer.prepared.halves import Halves, reported_part, sample_digests
from finetune_trainer.prepared.split import TESTED, Side
from finetune_trainer.storage import runfiles
from finetune_trainer.storage.objects import ObjectStore
from finetune_trainer.storage.runfiles import PartTraining, RowAnswers, RunResult, SetAnswers


@dataclass(frozen=True)
class MeasuredSet:
    """One set."""

    name: str
    retention: bool
    """Whether it is a set of data.retention."""
    metrics: Kinds
    answered: list[Answered]
    """All rows; draws of a row follow each other."""
    references: Sequence[Reference]
    """Of the first samples, as many as any row has answered."""
    groups: Groups
    """Number of the group of each sample, shape [samples]."""
    slices: dict[str, list[str]]
    """Value of each field of evaluation.slices for each sample; none for a retention set."""
    digests: Sequence[str]
    """Of all samples: see ``sample_digest``."""

    parts: Sequence[Answered | None] = ()
    """After training on each of ``SHARES`` of the training samples; None: not measured. Empty
    without ``evaluation.dataCurve``, and for a retention set."""

    @property
    def judged(self) -> Answered:
        """Answers to the test prompts as they are, of the tuned model or, where nothing was
        trained, of the base model."""
        rows = {row.row: row for row in self.answered if row.row in (BASE, TUNED)}
        return rows.get(TUNED) or rows[BASE]


def measured_sets(
    store: ObjectStore,
    run_uri: str,
    result: RunResult,
    data: PreparedData,
    spec: FineTuneJobSpec,
    halves: Halves | None = None,
) -> list[MeasuredSet]:
    """Return the sets, with the rows that the gang answered. A result of an earlier trainer names
    no rows, and has no sets.

    Args:
        spec: of the run.
        halves: of the retention sets, with ``evaluation.remedy``.
    """
    fields, kinds = spec.evaluation.slices, spec.evaluation.kinds
    values = data.slices() if fields else {}
    rows = [runfiles.read_row(store, run_uri, row) for row in result.rows]
    trained = [runfiles.read_part(store, run_uri, s) for s in SHARES] if result.data_curve else []
    found = []
    for scores in result.summary.scores:
        side, number = _place(data, scores.name)
        index = data.index(side)
        part = reported_part(halves, side)
        positions = np.flatnonzero(index.set == number) if part is None else part[number]
        answered = [
            _answered(row, of_set, positions)
            for row in rows
            for of_set in row.sets
            if of_set.name == scores.name
        ]
        if not answered:
            continue
        declared = {*kinds} - {*METRICS}
        has = {
            *scores.judged,
            *declared.intersection(measured_on(data.manifest.sets[number], spec)),
        }
        most = max(len(each.samples) for each in answered)
        found.append(
            MeasuredSet(
                name=scores.name,
                retention=side == "retention",
                metrics={m: kind for m, kind in kinds.items() if m in has},
                answered=answered,
                references=data.references(side, positions[:most].tolist()),
                groups=index.groups[positions],
                slices=(
                    {field: [values[field][at] for at in positions.tolist()] for field in fields}
                    if side == "test"
                    else {}
                ),
                digests=list(sample_digests(data, side, positions)),
                parts=[_part(each, scores.name, positions) for each in trained]
                if side == "test"
                else [],
            )
        )
    return found


def _part(trained: PartTraining, name: str, positions: np.ndarray) -> Answered | None:
    """What the model did with a set after training on a part of the training samples."""
    found = [each for each in trained.sets if each.name == name]
    row = RowAnswers(row=TUNED, sets=found)
    return _answered(row, found[0], positions) if found else None


def _place(data: PreparedData, name: str) -> tuple[Side, int]:
    return next((s, n) for s in TESTED for n, found in data.set_names(s) if found == name)


def _answered(found: RowAnswers, of_set: SetAnswers, positions: np.ndarray) -> Answered:
    asked = sum(len(each.answers) for each in found.sets)
    share = len(of_set.answers) / asked if asked else 1 / len(found.sets)
    return Answered(
        row=found.row,
        samples=np.searchsorted(positions, of_set.positions).tolist()
        if of_set.positions
        else range(len(of_set.answers)),
        answers=of_set.answers,
        tokens=of_set.tokens,
        losses=np.array(of_set.losses, np.float64),
        labels=np.array(of_set.labels, np.float64),
        metrics=of_set.metrics,
        label_scores=of_set.label_scores,
        process_seconds=found.process_seconds * share,
        measured_by=found.measured_by,
    )
