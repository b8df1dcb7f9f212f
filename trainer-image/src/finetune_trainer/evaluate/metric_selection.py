"""Metrics that a data set supports, and validation of the metrics that a spec requests."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

from finetune_api.judge import WIN_RATE
from finetune_api.sources import Format
from finetune_api.spec import FineTuneJobSpec
from finetune_api.tasks import (
    DEFAULT_METRICS,
    METRICS,
    MOST_LABELS,
    OF_BUILT_IN,
    TASKS,
    MetricSource,
    TaskName,
)
from finetune_trainer.failures import UserError
from finetune_trainer.prepared.manifest import DataSet
from finetune_trainer.prepared.split import TESTED

log = logging.getLogger(__name__)

_SUPPORTED: Final[dict[Format, tuple[MetricSource, ...]]] = {
    "Text": ("Loss",),
    "Classification": ("Loss", "Labels", "Text", "LabelScores"),
}
_DEFAULT: Final[dict[Format, tuple[MetricSource, ...]]] = {
    "Text": ("Loss",),
    "Classification": ("Loss", "Labels"),
}
_PAIRS: Final[tuple[MetricSource, ...]] = ("Loss", "Text", "Instructions")
"""Of all other formats."""


def metrics_for(
    form: Format, requested: Sequence[str] | None, task: TaskName = "CausalLM",
    *, built_in: bool = False,
) -> list[str]:  # fmt: skip
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


def metrics_of(
    entry: DataSet, requested: Sequence[str] | None, task: TaskName = "CausalLM"
) -> list[str]:
    """Return the metrics of a data set: see ``metrics_for``. Those of the log-likelihoods of labels
    need a set whose labels are known and not too many."""
    found = metrics_for(entry.format, requested, task, built_in=entry.built_in)
    return [m for m in found if entry.labels or METRICS[m].source != "LabelScores"]


def measured_on(entry: DataSet, spec: FineTuneJobSpec) -> list[str]:
    """Return the metrics of the final test on a data set: see ``metrics_of``, and those of
    ``evaluation.customMetrics`` where answers have references; and that of ``evaluation.judge`` on
    test sets with free text as answers."""
    found = metrics_of(entry, spec.evaluation.metrics, spec.task)
    if entry.format == "Text" or entry.built_in:
        return found
    found += [metric.name for metric in spec.evaluation.custom_metrics]
    judged = spec.evaluation.judge is not None and entry.format != "Classification"
    return [*found, WIN_RATE] if judged and entry.split == "test" else found


def check_metrics(spec: FineTuneJobSpec, sets: Sequence[DataSet]) -> None:
    """Refuse metrics that no data set of the run supports.

    Args:
        sets: the data sets with samples.

    Raises:
        UserError: 'MetricWithoutData', naming the field, the metric and the supported formats.
    """
    validation = [entry for entry in sets if entry.split == "validation"]
    for metric in spec.evaluation.metrics or ():
        _require("evaluation.metrics", metric, sets, "data set")
        for entry in sets:
            lacks = entry.format == "Classification" and not entry.labels
            if lacks and METRICS[metric].source == "LabelScores" and entry.split in TESTED:
                log.warning(
                    "set %s has no %s: more than %d labels", entry.name, metric, MOST_LABELS
                )
    if spec.evaluation.judge and not any(WIN_RATE in measured_on(e, spec) for e in sets):
        raise UserError(
            "MetricWithoutData",
            "spec.evaluation.judge: there is no test set with free text as answers (any format but"
            " Text and Classification); give data.test, a data.split.test above 0, or no judge",
        )
    if METRICS[spec.checkpoint.metric].source != "Loss":
        _require("checkpoint.metric", spec.checkpoint.metric, validation, _VALIDATION)
    if spec.training.early_stopping is not None:
        metric = spec.training.early_stopping.metric
        _require("training.earlyStopping.metric", metric, validation, _VALIDATION)


_VALIDATION: Final = "validation set with samples"
_FITTING: Final[dict[MetricSource, str]] = {
    "Loss": "any format",
    "Labels": "format Classification",
    "Text": "any format but Text",
    "Instructions": "any format but Text and Classification",
    "LabelScores": f"format Classification with at most {MOST_LABELS} labels",
}


def _require(field: str, metric: str, sets: Sequence[DataSet], kind: str) -> None:
    if any(metrics_of(entry, [metric]) for entry in sets):
        return
    fitting = _FITTING[METRICS[metric].source]
    forms = ", ".join(dict.fromkeys(entry.format for entry in sets))
    there = f"available formats: {forms}" if forms else "there is none"
    raise UserError(
        "MetricWithoutData",
        f"spec.{field}: {metric} needs a {kind} of {fitting} ({there}); choose another metric, or"
        " give such data (data.validation, or a larger data.split.validation)",
    )
