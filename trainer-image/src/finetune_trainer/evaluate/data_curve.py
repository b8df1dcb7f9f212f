"""What more training data would do: the data curve of a test set, and what follows from it.

    answers after training on 25 %, 50 % and 100 % ──► 100 % against 50 %, paired ─────┐
                                                  └──► power law ──► gain of twice ────┴──► advice

Pure. The interval is about the test samples; another draw of the parts would differ, too. Nothing
is chosen by the curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from finetune_api.evaluation_results import (
    Comparison,
    DataCurve,
    Estimate,
    GateResult,
    Recommendation,
    SetCurve,
    SetTable,
)
from finetune_api.tasks import Kinds, MetricKind
from finetune_trainer.evaluate.metric_text import interval_text, shown
from finetune_trainer.evaluate.recommendation import primary_of
from finetune_trainer.evaluate.table import RowOutcome, compare_rows, estimates

SHARES: Final = (0.25, 0.5)
"""Shares of the training samples that are trained on beside the whole; each is half of the next."""


def set_curve(
    name: str,
    parts: Sequence[RowOutcome | None],
    tuned: RowOutcome,
    metrics: Kinds,
    min_points: float,
) -> SetCurve | None:
    """Return the curve of a test set; None: no metric compares its rows, or no part has answers.

    Args:
        parts: what the model did after training on each of ``SHARES``; None: not measured.
        tuned: after training on all samples.
        metrics: that the set has.
        min_points: see ``compare_outcomes``.
    """
    metric = primary_of(metrics)
    if metric is None or not any(parts):
        return None
    kind, main, half = metrics[metric], {metric: metrics[metric]}, parts[-1]
    values = [estimates(row, main).get(metric) if row else None for row in (*parts, tuned)]
    compared = compare_rows(half, tuned, main, min_points).get(metric) if half else None
    gain = _possible(kind, values[-1], next_gain([v.value if v else None for v in values]))
    helps = _helps(kind, compared, gain, min_points)
    return SetCurve(
        data_set=name,
        metric=metric,
        values=values,
        comparison=compared,
        next_gain=gain,
        more_helps=helps,
        because=_because(metric, kind, values, compared, gain, helps),
    )


def next_gain(values: Sequence[float | None]) -> float | None:
    """Return the change that twice the data would bring, by the power law through three values.

    With value(n) = a + b * n^-c the changes from each doubling to the next have one ratio, 2^-c. A
    law of falling changes of one sign (0 < ratio < 1) fits; None: it does not, or values are
    missing.
    """
    if len(values) != 3:
        return None
    quarter, half, whole = values
    if quarter is None or half is None or whole is None or quarter == half:
        return None
    ratio = (whole - half) / (half - quarter)
    return (whole - half) * ratio if 0 < ratio < 1 else None


def _possible(kind: MetricKind, whole: Estimate | None, gain: float | None) -> float | None:
    """Cut a gain at the best value that the metric can have."""
    if gain is None or whole is None or kind.span is None:
        return gain
    room = kind.span - whole.value if kind.higher_is_better else -whole.value
    return min(gain, room) if kind.higher_is_better else max(gain, room)


def _helps(
    kind: MetricKind, compared: Comparison | None, gain: float | None, min_points: float
) -> bool | None:
    if compared is None or compared.verdict == "TooFewSamples":
        return None
    if compared.verdict != "Better":
        return False
    return gain is None or abs(gain) >= min_points * kind.point


def _because(
    metric: str,
    kind: MetricKind,
    values: Sequence[Estimate | None],
    compared: Comparison | None,
    gain: float | None,
    helps: bool | None,
) -> str:
    better = compared is not None and compared.verdict == "Better"
    words = {
        True: "more of the same data would help",
        False: "more of the same data would " + ("bring little" if better else "not help"),
        None: "whether more of the same data would help is not known",
    }[helps]
    named = zip((*SHARES, 1.0), values, strict=True)
    figures = ", ".join(f"{100 * share:g} %: {shown(kind, v.value)}" for share, v in named if v)
    text = f"{words}. {metric} by share of the training samples: {figures}"
    if compared is None:
        return text
    text += (
        f"; 100 % against 50 %: {shown(kind, compared.effect, signed=True)}"
        f" ({interval_text(kind, compared.low, compared.high)}), p {compared.p:.2g}"
    )
    if gain is not None and better:
        text += (
            f"; twice the data would bring about {shown(kind, gain, signed=True)} more, if the"
            " trend holds"
        )
    return text


def with_advice(
    table: SetTable,
    curve: DataCurve | None,
    gates: Sequence[GateResult],
    kinds: Kinds,
    min_points: float,
) -> SetTable:
    """Return the table of a test set with the curve in its recommendation, which is CollectMoreData
    if more of the same data would help, and the target is not reached.

    The target are the gates on the set. Without one it is missed if tuning is what is recommended,
    and the metric is below its best value by more than what matters.

    Args:
        gates: results of all gates.
        kinds: all metrics of the run.
        min_points: see ``compare_outcomes``.
    """
    found = next((c for c in curve.sets if c.data_set == table.name), None) if curve else None
    known = table.recommendation
    if found is None or table.retention:
        return table
    missed = [gate for gate in gates if gate.data_set == table.name and not gate.passed]
    gated = any(gate.data_set == table.name for gate in gates)
    if found.more_helps and (
        missed if gated else _far(found, kinds[found.metric], known, min_points)
    ):
        target = f"missed: {missed[0].text}" if missed else "the tuned model is far from all right"
        advised = f"{found.because}; {target}"
        if known is not None:
            advised += f". For now {known.action}: {known.because}"
        known = Recommendation(
            action="CollectMoreData", row="Tuned", metric=found.metric, because=advised
        )
    elif known is not None:
        because = f"{known.because}. Of the data: {found.because}"
        known = known.model_copy(update={"because": because})
    return table.model_copy(update={"recommendation": known})


def _far(
    curve: SetCurve, kind: MetricKind, known: Recommendation | None, min_points: float
) -> bool:
    """Whether the tuned model, which is recommended, is far from all right."""
    value = curve.values[-1]
    tunes = known is not None and known.action in ("Tune", "TuneAndRetrieve")
    if not tunes or kind.span is None or value is None:
        return False
    best = kind.span if kind.higher_is_better else 0.0
    return abs(best - value.value) > min_points * kind.point
