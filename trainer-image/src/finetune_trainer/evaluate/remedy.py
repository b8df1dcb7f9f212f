"""The choice of ``evaluation.remedy``: a point between the base and the tuned model.

    losses of each point ──► change of each retention set, with its interval ──► qualifies?
    validation losses of those that qualify ──► the lowest

Pure. A point qualifies by the rule of a gate WorsensAtMost, on the choosing halves. The gates
themselves are about the other halves, which have chosen nothing, so their level holds however many
points were tried.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finetune_api.evaluation import Evaluation
from finetune_api.evaluation_results import Comparison
from finetune_api.remedy import RemedyPoint, RemedyResult, RetentionChange
from finetune_api.tasks import kinds_of
from finetune_trainer.evaluate.comparisons import Outcome, compare_outcomes, score_of
from finetune_trainer.evaluate.gates import rules_out
from finetune_trainer.evaluate.metric_text import shown
from finetune_trainer.evaluate.weighted_scores import value_of


@dataclass(frozen=True)
class MeasuredPoint:
    """Losses of the model at a point."""

    point: float
    validation_loss: float
    """Over all validation sets, in nats per supervised token."""
    retention: Mapping[str, Outcome]
    """What it did with the choosing half of each retention set."""


def limits_of(evaluation: Evaluation, names: Sequence[str]) -> dict[str, float]:
    """Return the limits of the retention sets: the lowest of their gates WorsensAtMost on Loss
    against Base, else that of the remedy."""
    assert evaluation.remedy is not None, "limits are those of a remedy"
    found = {}
    for name in names:
        values = [
            gate.effective_value
            for gate in evaluation.gates
            if (gate.data_set, gate.metric) == (name, "Loss")
            and (gate.operator, gate.effective_row) == ("WorsensAtMost", "Base")
        ]
        found[name] = min(values, default=float(evaluation.remedy.worsens_at_most))
    return found


def choose(evaluation: Evaluation, points: Sequence[MeasuredPoint]) -> RemedyResult:
    """Return the measured points with the chosen one.

    Args:
        points: from the tuned model (1) to the base model (0), which is not chosen.
    """
    assert evaluation.remedy is not None, "chosen by a remedy"
    *candidates, base = points
    limits = limits_of(evaluation, list(base.retention))
    compared = [_compared(each, base, float(evaluation.min_effect)) for each in points]
    results = [
        _result(each, changes, limits) for each, changes in zip(points, compared, strict=True)
    ]
    qualifying = [
        each
        for each, result in zip(candidates, results, strict=False)
        if result.qualifies and math.isfinite(each.validation_loss)
    ]
    # Of equal losses the first: the nearest to the tuned model.
    chosen = min(qualifying, key=lambda each: each.validation_loss, default=None)
    return RemedyResult(
        scan=evaluation.remedy.scan,
        limits=limits,
        points=results,
        chosen=chosen.point if chosen else None,
        because=_because(results, chosen.point if chosen else None, limits),
    )


_LOSS = kinds_of("Loss")


def _compared(
    each: MeasuredPoint, base: MeasuredPoint, min_points: float
) -> dict[str, Comparison | None]:
    return {
        name: compare_outcomes(base.retention[name], outcome, _LOSS, min_points).get("Loss")
        for name, outcome in each.retention.items()
    }


def _result(
    each: MeasuredPoint, compared: Mapping[str, Comparison | None], limits: Mapping[str, float]
) -> RemedyPoint:
    changes = [
        RetentionChange(
            data_set=name,
            loss=_finite(_loss(each.retention[name])),
            change=found.effect if found else None,
            low=found.low if found else None,
            high=found.high if found else None,
        )
        for name, found in compared.items()
    ]
    return RemedyPoint(
        point=each.point,
        validation_loss=_finite(each.validation_loss),
        retention=changes,
        qualifies=all(
            found is not None and rules_out(_LOSS["Loss"], found, limits[name])
            for name, found in compared.items()
        ),
    )


def _loss(outcome: Outcome) -> float:
    score = score_of("Loss", outcome)
    return value_of(score) if score else math.nan


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _because(
    points: Sequence[RemedyPoint], chosen: float | None, limits: Mapping[str, float]
) -> str:
    *candidates, base = points
    tuned = candidates[0]
    if chosen is None:
        near = min(candidates, key=lambda each: _excess(each, limits))
        return (
            "no point qualifies, so the tuned model is kept as it is. The nearest is"
            f" {near.point:g}: {_changes(near, limits)}"
        )
    found = next(each for each in candidates if each.point == chosen)
    losses = f"tuned {_shown(tuned.validation_loss)}, base {_shown(base.validation_loss)}"
    what = "the tuned model as it is" if found is tuned else f"point {chosen:g}"
    count = sum(each.qualifies for each in candidates)
    return (
        f"{what}, with the lowest validation loss of the points that qualify ({count} of"
        f" {len(candidates)}): {_shown(found.validation_loss)} ({losses});"
        f" {_changes(found, limits)}"
    )


def _excess(each: RemedyPoint, limits: Mapping[str, float]) -> float:
    """By how much the worst retention set misses its limit."""
    return max(
        math.inf if change.high is None else change.high - limits[change.data_set]
        for change in each.retention
    )


def _changes(each: RemedyPoint, limits: Mapping[str, float]) -> str:
    return "; ".join(
        f"{change.data_set} Loss {_shown(change.change, signed=True)}, at most"
        f" {_shown(change.high, signed=True)} (limit {limits[change.data_set]:g})"
        for change in each.retention
    )


def _shown(value: float | None, signed: bool = False) -> str:
    return "unknown" if value is None else shown(_LOSS["Loss"], value, signed)
