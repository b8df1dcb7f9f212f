"""The rows of each test set as text, for the report and the model card."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from finetune_api.evaluation_results import EvaluationResult, Recommendation, TableRow
from finetune_trainer.evaluate.recommendation import PRIMARY
from finetune_trainer.publish.run_facts import About, Score, by_set

_SHOWN = 3
"""Metrics that a table of rows shows: the primary one first."""


@dataclass(frozen=True)
class ShownRow:
    """A row as text."""

    name: str
    samples: int
    values: list[str]
    """Values of the shown metrics."""
    ahead: str
    """Gain of the tuned model over this row, with its interval."""
    verdict: str
    tokens: str
    """Tokens per answer."""
    seconds: str


@dataclass(frozen=True)
class ShownTable:
    """The rows of a test set as text."""

    name: str
    metrics: list[str]
    primary: str
    """Metric by which the rows are compared."""
    rows: list[ShownRow]
    advice: Recommendation | None


def tables_of(about: About) -> list[ShownTable]:
    """The test sets that have more rows than base and tuned model."""
    return shown_tables(about.evaluation, about.scores)


def _compared(scores: Sequence[Score]) -> list[Score]:
    """The scores that a table of rows shows, the primary one first: those of answers."""
    kinds = {score.metric: score for score in scores if score.kind.source != "Loss"}
    order = [m for m in PRIMARY if m in kinds]
    return [kinds[m] for m in dict.fromkeys([*order, *kinds])][:_SHOWN]


def shown_tables(evaluation: EvaluationResult, scores: Iterable[Score]) -> list[ShownTable]:
    """As ``tables_of``."""
    of_set = dict(by_set(scores))
    return [
        _shown(table.name, table.rows, table.recommendation, compared)
        for table in evaluation.sets
        if len(table.rows) > 2 and (compared := _compared(of_set.get(table.name, [])))
    ]


def _shown(
    name: str, rows: Sequence[TableRow], advice: Recommendation | None, shown: Sequence[Score]
) -> ShownTable:
    return ShownTable(
        name, [s.metric for s in shown], shown[0].metric, [_row(r, shown) for r in rows], advice
    )


def _row(row: TableRow, shown: Sequence[Score]) -> ShownRow:
    first = shown[0]
    compared = row.comparisons.get(first.metric)
    ahead = Score(first.data_set, row.samples, first.metric, None, 0.0, compared)
    values = []
    for score in shown:
        found = row.metrics.get(score.metric)
        text = score.estimated(found)
        if found is not None and found.lowest is not None:
            text += f", draws {score.show(found.lowest)} to {score.show(found.highest)}"
        values.append(text)
    return ShownRow(
        name=row.row,
        samples=row.samples,
        values=values,
        ahead=f"{first.show(compared.effect, signed=True)} ({ahead.interval})" if compared else "",
        verdict=ahead.verdict,
        tokens=f"{row.tokens_per_answer:.1f}" if row.tokens_per_answer else "",
        seconds=f"{row.process_seconds:.1f}",
    )
