"""Values of metrics as text."""

from __future__ import annotations

from finetune_api.tasks import METRICS, Metric


def shown(metric: Metric, value: float, signed: bool = False) -> str:
    """Format a value of a metric: ``97.5 %``, ``+0.123``."""
    sign = "+" if signed else ""
    return f"{100 * value:{sign}.1f} %" if METRICS[metric].percent else f"{value:{sign}.3g}"
