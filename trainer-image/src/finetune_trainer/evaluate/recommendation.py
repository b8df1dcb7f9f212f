"""What the results of a test set recommend: tuning, a prompt, retrieval, or the base model alone.

The best row is not always worth its price. The recommendation is the cheapest row whose answers are
not significantly worse than the best row's, by a paired comparison over the same samples.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Final

from finetune_api.evaluation_results import (
    AS_IS,
    RETRIEVAL,
    Action,
    Comparison,
    Recommendation,
    Row,
)
from finetune_api.judge import WIN_RATE
from finetune_api.tasks import METRICS, Kinds, Metric, MetricKind
from finetune_trainer.evaluate.comparisons import score_of
from finetune_trainer.evaluate.metric_text import shown
from finetune_trainer.evaluate.table import RowOutcome, compare_rows
from finetune_trainer.evaluate.weighted_scores import value_of

PRIMARY: Final[tuple[Metric, ...]] = (
    "InstructionFollowing", "Accuracy", "LabelAccuracy", "NumberMatch", "ChoiceMatch",
    "JsonFieldF1", "Rouge", "ExactMatch", "TokenF1", "Bleu",
)  # fmt: skip
"""Metrics by which rows are compared, the first that the set has: see ``primary_of``."""
_WORDS: Final[dict[Action, str]] = {
    "Neither": "no way does significantly better than the base model as it is",
    "Prompt": "a prompt does as well",
    "Retrieve": "retrieval does as well",
    "Tune": "tuning is what helps",
    "TuneAndRetrieve": "tuning with retrieval is what helps",
}


def recommend(
    rows: Sequence[RowOutcome], metrics: Kinds, min_points: float
) -> Recommendation | None:
    """Return what the rows of a test set recommend; None: no main metric.

    Args:
        rows: of the set.
        metrics: that the set has.
        min_points: smallest gain that matters, see ``compare_outcomes``.
    """
    metric = primary_of(metrics)
    if metric is None:
        return None
    valued = [(row, _value(row, metric)) for row in rows]
    kind = metrics[metric]
    sign = 1 if kind.higher_is_better else -1
    ways: dict[Action, tuple[RowOutcome, float]] = {}
    for row, value in valued:
        action = _action(row.row)
        if value is not None and (action not in ways or sign * value > sign * ways[action][1]):
            ways[action] = row, value
    if len(ways) < 2:
        return None
    best = max(ways.values(), key=lambda way: sign * way[1])
    for action in _WORDS:
        if action not in ways:
            continue
        row, value = ways[action]
        compared = None
        if row is not best[0]:
            compared = compare_rows(row, best[0], {metric: kind}, min_points).get(metric)
            if compared is None or compared.verdict == "Better":
                continue
        return Recommendation(
            action=action,
            row=row.row.name,
            metric=metric,
            because=_because(action, metric, kind, ways, row, best[0], compared),
        )
    return None


def primary_of(metrics: Collection[str]) -> str | None:
    """The main metric of a set that has these metrics: the first of PRIMARY, or of the declared
    ones, or else the loss; not the judge's, which knows two rows only. None: it has none."""
    declared = [metric for metric in metrics if metric not in METRICS and metric != WIN_RATE]
    return next((m for m in (*PRIMARY, *declared, "Loss") if m in metrics), None)


def _action(row: Row) -> Action:
    if row.model == "Tuned":
        return "TuneAndRetrieve" if row.prompt == RETRIEVAL else "Tune"
    if row.prompt == AS_IS:
        return "Neither"
    return "Retrieve" if row.prompt == RETRIEVAL else "Prompt"


def _value(row: RowOutcome, metric: str) -> float | None:
    score = score_of(metric, row.outcome(row.samples))
    value = value_of(score) if score else math.nan
    return value if math.isfinite(value) else None


def _because(
    action: Action,
    metric: str,
    kind: MetricKind,
    ways: dict[Action, tuple[RowOutcome, float]],
    chosen: RowOutcome,
    best: RowOutcome,
    compared: Comparison | None,
) -> str:
    figures = ", ".join(f"{row.row.name} {shown(kind, value)}" for row, value in ways.values())
    text = f"{_WORDS[action]}. {metric}: {figures}"
    if compared is not None:
        text += (
            f". {best.row.name} is ahead of {chosen.row.name} by"
            f" {shown(kind, abs(compared.effect))}, which is within the noise"
            f" (p {compared.p:.2g}) or matters too little"
        )
    return text
