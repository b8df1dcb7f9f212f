"""Metrics that a data set supports, and validation of the metrics that a spec requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from finetune_api.sources import Format
from finetune_api.spec import FineTuneJobSpec
from finetune_api.tasks import (
    DEFAULT_METRICS,
    METRICS,
    OF_BUILT_IN,
    TASKS,
    Metric,
    MetricSource,
    TaskName,
)
from finetune_trainer.failures import UserError

_SUPPORTED: Final[dict[Format, tuple[MetricSource, ...]]] = {
    "Text": ("Loss",),
    "Classification": ("Loss", "Labels", "Text"),
}
_DEFAULT: Final[dict[Format, tuple[MetricSource, ...]]] = {
    "Text": ("Loss",),
    "Classification": ("Loss", "Labels"),
}
_PAIRS: Final[tuple[MetricSource, ...]] = ("Loss", "Text", "Instructions")
"""Of all other formats."""


def metrics_for(
    form: Format, requested: Sequence[Metric] | None, task: TaskName = "CausalLM",
    *, built_in: bool = False,
) -> list[Metric]:  # fmt: skip
    """Return the metrics of a data set of this format: those of ``requested`` that format and task
    support, in the same order; without ``requested``, the defaults of the format.

    Args:
        built_in: whether it is the set of verifiable instructions. Its references are one of many
            right answers, so they are compared with nothing.
    """
    sources = (_DEFAULT if requested is None else _SUPPORTED).get(form, _PAIRS)
    wanted = dict.fromkeys(DEFAULT_METRICS if requested is None else requested)
    task_metrics = TASKS[task].metrics
    found = [m for m in wanted if METRICS[m].source in sources and m in task_metrics]
    if built_in and TASKS[task].generates:
        return [*(m for m in found if METRICS[m].source == "Loss"), OF_BUILT_IN]
    return found


def check_metrics(spec: FineTuneJobSpec, formats: Mapping[str, Sequence[Format]]) -> None:
    """Refuse metrics that no data set of the run supports.

    Args:
        formats: formats of the data sets with samples, by split (train, validation, test).

    Raises:
        UserError: 'MetricWithoutData', naming the field, the metric and the supported formats.
    """
    everywhere = [form for forms in formats.values() for form in forms]
    for metric in spec.evaluation.metrics or ():
        _require("evaluation.metrics", metric, everywhere, "data set")
    if METRICS[spec.checkpoint.metric].source != "Loss":
        _require("checkpoint.metric", spec.checkpoint.metric, formats["validation"], _VALIDATION)
    if spec.training.early_stopping is not None:
        metric = spec.training.early_stopping.metric
        _require("training.earlyStopping.metric", metric, formats["validation"], _VALIDATION)


_VALIDATION: Final = "validation set with samples"
_FITTING: Final[dict[MetricSource, str]] = {
    "Loss": "any format",
    "Labels": "format Classification",
    "Text": "any format but Text",
    "Instructions": "any format but Text and Classification",
}


def _require(field: str, metric: Metric, forms: Sequence[Format], kind: str) -> None:
    if any(metrics_for(form, [metric]) for form in forms):
        return
    fitting = _FITTING[METRICS[metric].source]
    there = f"available formats: {', '.join(dict.fromkeys(forms))}" if forms else "there is none"
    raise UserError(
        "MetricWithoutData",
        f"spec.{field}: {metric} needs a {kind} of {fitting} ({there}); choose another metric, or"
        " give such data (data.validation, or a larger data.split.validation)",
    )
