"""The rows of each test set as text, for the report and the model card."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from finetune_api.evaluation_results import (
    BASE,
    DataCurve,
    EvaluationResult,
    Slice,
    TableRow,
    TaskMatrix,
)
from finetune_api.tasks import Kinds, MetricKind
from finetune_trainer.evaluate.data_curve import SHARES
from finetune_trainer.evaluate.recommendation import PRIMARY, primary_of
from finetune_trainer.publish.run_facts import About, Score, by_set

_SHOWN = 3
"""Metrics that a table of rows shows: the primary one first."""


@dataclass(frozen=True)
class ShownRow:
    """A row as text."""

    name: str
    samples: str
    """Number of samples, and of their groups."""
    values: list[str]
    """Values of the shown metrics."""
    ahead: str
    """Gain of the judged model over this row, with its interval."""
    verdict: str
    tokens: str
    """Tokens per answer."""
    seconds: str
    """Seconds times processes, and which run has spent them, if another one has."""


@dataclass(frozen=True)
class ShownTable:
    """The rows of a test set as text."""

    name: str
    metrics: list[str]
    primary: str
    """Metric by which the rows are compared."""
    judged: str
    """Name of the row that is compared with the others."""
    rows: list[ShownRow]


@dataclass(frozen=True)
class ShownSlice:
    """A slice as text."""

    field: str
    value: str
    samples: str
    """Number of samples, and of their groups."""
    base: str
    """Value of the base model, with its interval."""
    tuned: str
    gain: str
    """Gain of the tuned model, with its interval; "–" as tuned: nothing was trained."""
    better: bool | None
    """Whether the tuned model is better; None: equal, or not known."""
    p: str
    """p of the comparison after Holm."""


@dataclass(frozen=True)
class ShownSlices:
    """The slices of a test set as text."""

    name: str
    metric: str
    slices: list[ShownSlice]


def slices_of(evaluation: EvaluationResult, kinds: Kinds) -> list[ShownSlices]:
    """The test sets that have slices, the worst change first."""
    return [
        ShownSlices(
            table.name, metric, [_slice(x, metric, kinds[metric], table.name) for x in table.slices]
        )
        for table in evaluation.sets
        if table.slices and (metric := table.slices[0].metric)
    ]


def _slice(part: Slice, metric: str, kind: MetricKind, name: str) -> ShownSlice:
    base, tuned = part.base.get(metric), part.tuned.get(metric)
    compared = part.comparison
    score = Score(
        name, part.samples, metric, kind, base.value if base else None,
        tuned.value if tuned else None, compared,
    )  # fmt: skip
    p = compared.p_adjusted if compared else None
    return ShownSlice(
        field=part.field,
        value=part.value,
        samples=counted(part.samples, part.groups),
        base=score.estimated(base),
        tuned=score.estimated(tuned),
        gain=f"{score.show(compared.effect, signed=True)} ({score.interval})" if compared else "–",
        better=score.better,
        p="–" if p is None else f"{p:.2g}",
    )


@dataclass(frozen=True)
class ShownMatrix:
    """The matrix of a sequence of runs as text."""

    sets: list[str]
    """Headers of the columns: a set and its metric."""
    rows: list[tuple[str, list[str]]]
    """Each model, with its values."""
    forgetting: list[str]
    """Of each set, in the unit of its metric."""
    summary: str
    """Averages in words; "" if there are none."""
    not_read: str
    """Models whose published results were not read, and why; "" if there are none."""


def matrix_table(found: TaskMatrix | None, kinds: Kinds) -> ShownMatrix | None:
    """The matrix of a sequence of runs as text, or None."""
    if found is None:
        return None
    scores = [
        Score(c.data_set, c.samples, c.metric, kinds[c.metric], None, 0.0) for c in found.columns
    ]
    pairs = list(zip(scores, found.columns, strict=True))
    averages = [
        f"{what} {100 * value:+.1f} points"
        for what, value in (
            ("average forgetting", found.average_forgetting),
            ("backward transfer", found.backward_transfer),
        )
        if value is not None
    ]
    return ShownMatrix(
        sets=[f"{column.data_set}, {column.metric}" for column in found.columns],
        rows=[
            (name, [s.show(c.values[n]) + "*" * (c.own == n) for s, c in pairs])
            for n, name in enumerate(found.models)
        ],
        forgetting=[s.show(c.forgetting, signed=True) for s, c in pairs],
        summary=", ".join(averages),
        not_read="; ".join(f"{name}: {why}" for name, why in found.not_read.items()),
    )


@dataclass(frozen=True)
class ShownCurve:
    """The data curve as text."""

    sets: list[str]
    """Headers of the columns: a set and its metric."""
    rows: list[tuple[str, list[str]]]
    """Each share, with samples, steps, validation loss, values by set, and seconds."""
    because: list[tuple[str, str]]
    """Each set with what follows for it."""
    not_measured: str
    """Shares that were left out; "" if there are none."""


def curve_table(found: DataCurve | None, kinds: Kinds) -> ShownCurve | None:
    """The data curve as text, or None."""
    if found is None:
        return None
    scores = [Score(c.data_set, 0, c.metric, kinds[c.metric], None, 0.0) for c in found.sets]
    at = {share: number for number, share in enumerate((*SHARES, 1.0))}
    rows = []
    for point in found.points:
        values = [
            score.estimated(curve.values[at[point.share]])
            for score, curve in zip(scores, found.sets, strict=True)
        ]
        loss = "–" if point.validation_loss is None else f"{point.validation_loss:.4g}"
        spent = f"{point.process_seconds:.1f}" if point.process_seconds else ""
        cells = [f"{point.samples:,}", f"{point.steps:,}", loss, *values, spent]
        rows.append((f"{100 * point.share:g} %", cells))
    return ShownCurve(
        sets=[f"{curve.data_set}, {curve.metric}" for curve in found.sets],
        rows=rows,
        because=[(curve.data_set, curve.because) for curve in found.sets],
        not_measured=", ".join(f"{100 * share:g} %" for share in found.not_measured),
    )


def counted(samples: int, groups: int | None) -> str:
    """Format a number of samples: ``1,200``, or ``1,200 in 80 groups``."""
    return f"{samples:,}" if groups is None else f"{samples:,} in {groups:,} groups"


def tables_of(about: About) -> list[ShownTable]:
    """The test sets that have more rows than the base and the tuned model as they are."""
    return shown_tables(about.evaluation, about.scores)


def _compared(scores: Sequence[Score]) -> list[Score]:
    """The scores that a table of rows shows, the primary one first: those of answers."""
    known = {score.metric: score for score in scores if score.kind.source != "Loss"}
    order = [m for m in (primary_of(known), *PRIMARY) if m in known]
    return [known[m] for m in dict.fromkeys([*order, *known])][:_SHOWN]


def shown_tables(evaluation: EvaluationResult, scores: Iterable[Score]) -> list[ShownTable]:
    """As ``tables_of``."""
    of_set = dict(by_set(scores))
    return [
        _shown(table.name, judged, table.rows, compared)
        for table in evaluation.sets
        if (judged := table.judged)
        and len(table.rows) > (1 if judged.row == BASE.name else 2)
        and (compared := _compared(of_set.get(table.name, [])))
    ]


def _shown(
    name: str, judged: TableRow, rows: Sequence[TableRow], shown: Sequence[Score]
) -> ShownTable:
    return ShownTable(
        name, [s.metric for s in shown], shown[0].metric, judged.row, [_row(r, shown) for r in rows]
    )


def _row(row: TableRow, shown: Sequence[Score]) -> ShownRow:
    first = shown[0]
    compared = row.comparisons.get(first.metric)
    ahead = Score(first.data_set, row.samples, first.metric, first.kind, None, 0.0, compared)
    values = []
    for score in shown:
        found = row.metrics.get(score.metric)
        text = score.estimated(found)
        if found is not None and found.lowest is not None:
            text += f", draws {score.show(found.lowest)} to {score.show(found.highest)}"
        values.append(text)
    return ShownRow(
        name=row.row,
        samples=counted(row.samples, row.groups),
        values=values,
        ahead=f"{first.show(compared.effect, signed=True)} ({ahead.interval})" if compared else "",
        verdict=ahead.verdict,
        tokens=f"{row.tokens_per_answer:.1f}" if row.tokens_per_answer else "",
        seconds=f"{row.process_seconds:.1f}"
        + (f" (measured by run {row.measured_by})" if row.measured_by else ""),
    )
