"""The results of a run on its test sets, from the answers that the gang has written.

answers/ (one file a row) + references of the test samples ──► SetTable of each set
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from finetune_api.evaluation_results import TUNED, DataSetScores, EvaluationResult, SetTable
from finetune_api.run_spec import RunSpec
from finetune_api.tasks import METRICS
from finetune_trainer.evaluate.recommendation import recommend
from finetune_trainer.evaluate.table import Answered, adjusted, rows_of, table_of
from finetune_trainer.prepared.dataset import PreparedData, Reference
from finetune_trainer.storage import runfiles
from finetune_trainer.storage.objects import ObjectStore
from finetune_trainer.storage.runfiles import Example, RowAnswers, RunResult, SetAnswers

EXAMPLES = 8
"""Test samples of each set that the report shows, with all answers."""


def results_of(
    run_spec: RunSpec, store: ObjectStore, result: RunResult, data: PreparedData
) -> tuple[EvaluationResult, dict[str, list[Example]]]:
    """Return the tables of a run's test sets, and example answers by set. A result of an
    earlier trainer names no rows, and has no tables."""
    rows = [runfiles.read_row(store, run_spec.run_uri, row) for row in result.rows]
    points = float(run_spec.spec.evaluation.min_effect)
    tables: list[SetTable] = []
    examples: dict[str, list[Example]] = {}
    for scores in result.summary.scores:
        metrics = [m for m in METRICS if m in scores.tuned]
        number = next(n for n, name in data.set_names("test") if name == scores.name)
        positions = np.flatnonzero(data.index("test").set == number)
        answered = [
            _answered(found, of_set, positions)
            for found in rows
            for of_set in found.sets
            if of_set.name == scores.name
        ]
        if not answered:
            continue
        most = max(len(each.samples) for each in answered)
        references = data.references("test", positions[:most].tolist())
        outcomes = rows_of(answered, references)
        table = table_of(scores.name, outcomes, TUNED, metrics, points)
        found = recommend(outcomes, metrics, points)
        tables.append(table.model_copy(update={"recommendation": found}))
        examples[scores.name] = _examples(answered, references)
    return EvaluationResult(sets=adjusted(tables)), {k: v for k, v in examples.items() if v}


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
        process_seconds=found.process_seconds * share,
    )


def _examples(answered: Sequence[Answered], references: Sequence[Reference]) -> list[Example]:
    said: list[dict[str, str]] = [{} for _ in references[:EXAMPLES]]
    for row in answered:
        for number, answer in zip(row.samples, row.answers, strict=True):
            if number < len(said):
                said[number].setdefault(row.row.name, answer)
    return [
        Example(prompt=r.prompt, reference=r.completion, answers=answers)
        for r, answers in zip(references, said, strict=False)
        if answers
    ]


def with_comparisons(
    scores: Sequence[DataSetScores], result: EvaluationResult
) -> list[DataSetScores]:
    """The scores of base and tuned model, with their comparisons."""
    compared = {
        table.name: row.comparisons
        for table in result.sets
        for row in table.rows
        if row.row == "Base"
    }
    return [s.model_copy(update={"comparisons": compared.get(s.name, {})}) for s in scores]


def advice(result: EvaluationResult) -> str | None:
    """The recommendations of all sets, in words, at most 1024 characters."""
    found = [
        f"{table.name}: {table.recommendation.action}: {table.recommendation.because}"
        for table in result.sets
        if table.recommendation is not None
    ]
    return "; ".join(found)[:1024] or None
