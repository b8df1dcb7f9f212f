"""Values of metrics as text."""

from __future__ import annotations

from finetune_api.tasks import MetricKind


def interval_text(kind: MetricKind, low: float, high: float) -> str:
    """Format the ends of an interval in the metric's unit: ``2.1, 7.9``."""
    ends = (end * (100 if kind.percent else 1) for end in (low, high))
    return ", ".join(f"{end:,.0f}" if abs(end) >= 1000 else f"{end:.3g}" for end in ends)


def shown(kind: MetricKind, value: float, signed: bool = False) -> str:
    """Format a value of a metric: ``97.5 %``, ``+0.123``."""
    sign = "+" if signed else ""
    return f"{100 * value:{sign}.1f} %" if kind.percent else f"{value:{sign}.3g}"
