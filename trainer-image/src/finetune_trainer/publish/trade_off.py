"""The points that ``evaluation.remedy`` has measured, as a chart and a table of the report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from finetune_api.remedy import RemedyPoint, RemedyResult
from finetune_api.tasks import METRICS
from finetune_trainer.evaluate.metric_text import interval_text, shown
from finetune_trainer.publish.chart import Line, Point, line_chart


@dataclass(frozen=True)
class ShownPoint:
    """A point as text."""

    name: str
    validation: str
    """Validation loss."""
    retention: list[str]
    """Change of each retention set, with its interval."""
    verdict: str


@dataclass(frozen=True)
class TradeOff:
    """All points, from the tuned to the base model."""

    chart: str
    """Losses by point, as SVG."""
    sets: list[str]
    """Names of the retention sets, with their limits."""
    rows: list[ShownPoint]


def trade_off(found: RemedyResult) -> TradeOff:
    """Return the points for the report."""
    lines = [
        Line("Validation", "validation", list(_validation(found)), True),
        *(Line(name, "retention", list(_changes(found, name)), True) for name in found.limits),
    ]
    label = "Change of the losses from the base model (point 0) to the tuned model (point 1)"
    return TradeOff(
        chart=line_chart(lines, label, "point", 1.0 if found.chosen is None else found.chosen),
        sets=[f"{name} (limit {limit:g})" for name, limit in found.limits.items()],
        rows=[_row(each, found) for each in found.points],
    )


def _validation(found: RemedyResult) -> Iterator[Point]:
    base = found.points[-1].validation_loss
    for each in found.points:
        if each.validation_loss is not None and base is not None:
            yield each.point, each.validation_loss - base


def _changes(found: RemedyResult, name: str) -> Iterator[Point]:
    for each in found.points:
        for change in each.retention:
            if change.data_set == name and change.change is not None:
                yield each.point, change.change


def _row(each: RemedyPoint, found: RemedyResult) -> ShownPoint:
    changes = []
    for change in each.retention:
        text = "–"
        if change.change is not None and change.low is not None and change.high is not None:
            ends = interval_text(METRICS["Loss"], change.low, change.high)
            text = f"{shown(METRICS['Loss'], change.change, signed=True)} ({ends})"
        changes.append(text)
    names = {0.0: "0, the base model", 1.0: "1, the tuned model"}
    return ShownPoint(
        name=names.get(each.point, f"{each.point:g}"),
        validation="–"
        if each.validation_loss is None
        else shown(METRICS["Loss"], each.validation_loss),
        retention=changes,
        verdict=_verdict(each, found),
    )


def _verdict(each: RemedyPoint, found: RemedyResult) -> str:
    if each.point == 0:
        return ""
    if each.point == found.chosen:
        return "chosen"
    if each.point == 1 and found.chosen is None:
        return "kept: no point qualifies"
    return "qualifies" if each.qualifies else "worsens too much"
