"""The results of a run on its sets: tables, gates, and the comparison with the current model.

MeasuredSet of each set (+ predictions of the current model) ──► EvaluationResult
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from finetune_api.evaluation_results import (
    BASE,
    CURRENT,
    TUNED,
    CurrentResult,
    DataCurve,
    DataCurvePoint,
    DataSetScores,
    Estimate,
    EvaluationResult,
    SetCurve,
    SetTable,
    TableRow,
)
from finetune_api.remedy import RemedyResult
from finetune_api.results import MainResult
from finetune_api.spec import FineTuneJobSpec
from finetune_api.tasks import METRICS, Kinds, MetricKind
from finetune_trainer.evaluate.data_curve import SHARES, set_curve, with_advice
from finetune_trainer.evaluate.gates import against_current, results_of_gates
from finetune_trainer.evaluate.metric_text import interval_text, shown
from finetune_trainer.evaluate.recommendation import primary_of, recommend
from finetune_trainer.evaluate.slices import slices_of
from finetune_trainer.evaluate.table import Answered, RowOutcome, adjusted, rows_of, table_of
from finetune_trainer.publish.measured_sets import MeasuredSet
from finetune_trainer.publish.predictions import InUse, row_of_current
from finetune_trainer.publish.scoring import Scorer


def evaluate(
    spec: FineTuneJobSpec,
    sets: Sequence[MeasuredSet],
    in_use: InUse | None,
    score: Scorer,
    trained: Sequence[DataCurvePoint] = (),
) -> EvaluationResult:
    """Compare the rows of each set, and decide the gates.

    Args:
        in_use: None: output.current is not given, or no model is in use.
        score: scores the answers of the current model like those of the sets.
        trained: trainings on parts of the data, and the run itself; empty: no data curve.

    Raises:
        UserError: 'MetricFailed'.
    """
    points = float(spec.evaluation.min_effect)
    if in_use is not None:
        sets = [score(_with_current(each, in_use)) for each in sets]
    tables = adjusted([_table(each, points) for each in sets])
    gates = results_of_gates(
        spec.evaluation.gates, tables, spec.evaluation.kinds, in_use=in_use is not None
    )
    curve = _curve(sets, trained, points)
    return EvaluationResult(
        sets=[with_advice(table, curve, gates, spec.evaluation.kinds, points) for table in tables],
        gates=gates,
        current=_against(spec, tables, in_use),
        data_curve=curve,
    )


def _curve(
    sets: Sequence[MeasuredSet], trained: Sequence[DataCurvePoint], points: float
) -> DataCurve | None:
    if not trained:
        return None
    known = [point.share for point in trained]
    curves = (_curve_of(each, points) for each in sets if each.parts)
    return DataCurve(
        points=list(trained),
        not_measured=[share for share in SHARES if share not in known],
        sets=[curve for curve in curves if curve is not None],
    )


def _curve_of(found: MeasuredSet, points: float) -> SetCurve | None:
    def row(answers: Answered) -> RowOutcome:
        return RowOutcome([answers], found.references, found.groups)

    parts = [row(answers) if answers else None for answers in found.parts]
    return set_curve(found.name, parts, row(found.judged), found.metrics, points)


def _with_current(found: MeasuredSet, in_use: InUse) -> MeasuredSet:
    row = row_of_current(found, in_use.predictions)
    return found if row is None else replace(found, answered=[*found.answered, row])


def _table(found: MeasuredSet, points: float) -> SetTable:
    rows = rows_of(found.answered, found.references, found.groups)
    table = table_of(found.name, rows, found.judged.row, found.metrics, points)
    ways = [row for row in rows if row.row.model != "Current"]
    advised = None if found.retention else recommend(ways, found.metrics, points)
    slices = slices_of(rows, found.slices, found.metrics, points)
    return table.model_copy(
        update={"retention": found.retention, "recommendation": advised, "slices": slices}
    )


def _against(
    spec: FineTuneJobSpec, tables: Sequence[SetTable], in_use: InUse | None
) -> CurrentResult | None:
    if spec.output.current is None:
        return None
    margin = float(spec.output.current.margin or spec.evaluation.min_effect)
    passed, because = against_current(
        tables, spec.evaluation.kinds, margin, in_use=in_use is not None
    )
    run = in_use.model.run if in_use else None
    return CurrentResult(run=run, passed=passed, because=because)


def with_comparisons(
    scores: Sequence[DataSetScores], result: EvaluationResult
) -> list[DataSetScores]:
    """The scores of base and tuned model, with those that publish has measured, and their
    comparisons."""
    rows = {(table.name, row.row): row for table in result.sets for row in table.rows}

    def whole(found: DataSetScores) -> DataSetScores:
        base, tuned = rows.get((found.name, BASE.name)), rows.get((found.name, TUNED.name))
        return found.model_copy(
            update={
                "base": found.base | _values(base),
                "tuned": found.tuned | _values(tuned),
                "comparisons": base.comparisons if base else {},
            }
        )

    return [whole(each) for each in scores]


def _values(row: TableRow | None) -> dict[str, float]:
    """The metrics of a row that publish has measured."""
    measured = row.metrics if row else {}
    return {name: found.value for name, found in measured.items() if name not in METRICS}


def main_result(result: EvaluationResult, kinds: Kinds) -> MainResult | None:
    """What the tuned model gained on the first test set that has a comparison with the base model,
    by the metric that compares its rows; or, where nothing was trained, the value of the base model
    on the first test set. None: no set has one.

    Args:
        kinds: all metrics of the run.
    """
    for table in result.sets:
        judged, rows = table.judged, {row.row: row for row in table.rows}
        metric = primary_of(judged.metrics) if judged else None
        if table.retention or judged is None or metric is None:
            continue
        value = judged.metrics[metric]
        about = MainResult(
            data_set=table.name, metric=metric, value=_with_interval(kinds[metric], value)
        )
        base, current = rows.get(BASE.name), rows.get(CURRENT.name)
        if judged is base:
            return about
        found = base.comparisons.get(metric) if base else None
        if found is None:
            continue
        against = current.comparisons.get(metric) if current else None
        ends = interval_text(kinds[metric], found.low, found.high)
        return about.model_copy(
            update={
                "verdict": found.verdict,
                "gain": f"{shown(kinds[metric], found.effect, signed=True)} ({ends})",
                "current_gap": against.effect if against else None,
            }
        )
    return None


def _with_interval(kind: MetricKind, found: Estimate) -> str:
    text = shown(kind, found.value)
    if found.low is None or found.high is None:
        return text
    return f"{text} ({interval_text(kind, found.low, found.high)})"


def advice(result: EvaluationResult) -> str | None:
    """The recommendations of all sets, in words."""
    found = [
        f"{table.name}: {table.recommendation.action}: {table.recommendation.because}"
        for table in result.sets
        if table.recommendation is not None
    ]
    return cut("; ".join(found) or None)


def remedy_text(found: RemedyResult | None) -> str | None:
    """What the remedy has chosen, in words; None: there is none."""
    return f"{found.scan}: {found.because}" if found else None


def cut(text: str | None) -> str | None:
    """Shorten a text to what a termination message carries of it."""
    return text if text is None or len(text) <= 1024 else f"{text[:1023]}…"
