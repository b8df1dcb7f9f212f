"""Which metrics a data set can have, and whether the manifest asks for others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from finetune_api.sources import Format
from finetune_api.spec import FineTuneJobSpec
from finetune_api.tasks import TASKS, Metric, TaskName
from finetune_trainer.failures import UserError

OF_LOSS: Final[tuple[Metric, ...]] = ("Loss", "Perplexity")
OF_LABELS: Final[tuple[Metric, ...]] = ("Accuracy", "Precision", "Recall", "F1")
OF_TEXT: Final[tuple[Metric, ...]] = ("ExactMatch", "Bleu", "Rouge")


def metrics_for(
    form: Format, requested: Sequence[Metric] | None, task: TaskName = "CausalLM"
) -> list[Metric]:
    """Metrics of a set of that format: those of ``requested`` that fit it and the task, in that
    order; without ``requested``, the ones that are usual for it."""
    known = TASKS[task].metrics
    if form == "Text":
        possible, usual = OF_LOSS, OF_LOSS
    elif form == "Classification":
        possible, usual = OF_LOSS + OF_LABELS + OF_TEXT, OF_LOSS + OF_LABELS
    else:
        possible, usual = OF_LOSS + OF_TEXT, OF_LOSS + OF_TEXT
    if requested is None:
        return [metric for metric in usual if metric in known]
    return [m for m in dict.fromkeys(requested) if m in possible and m in known]


def check_metrics(spec: FineTuneJobSpec, formats: Mapping[str, Sequence[Format]]) -> None:
    """Refuse metrics that no data set of the run can have.

    Args:
        formats: formats of the sets that have samples, by split (train, validation, test).

    Raises:
        UserError: 'MetricWithoutData', naming the field, the metric and what would fit.
    """
    everywhere = [form for forms in formats.values() for form in forms]
    for metric in spec.evaluation.metrics or ():
        _require("evaluation.metrics", metric, everywhere, "data set")
    if spec.checkpoint.metric not in OF_LOSS:
        _require("checkpoint.metric", spec.checkpoint.metric, formats["validation"], _VALIDATION)
    if spec.training.early_stopping is not None:
        metric = spec.training.early_stopping.metric
        _require("training.earlyStopping.metric", metric, formats["validation"], _VALIDATION)


_VALIDATION: Final = "validation set with samples"


def _require(field: str, metric: Metric, forms: Sequence[Format], kind: str) -> None:
    if any(metrics_for(form, [metric]) for form in forms):
        return
    if metric in OF_LABELS:
        fitting = "format Classification"
    else:
        fitting = "any format but Text" if metric in OF_TEXT else "any format"
    there = (
        f"the formats there are: {', '.join(dict.fromkeys(forms))}" if forms else "there is none"
    )
    raise UserError(
        "MetricWithoutData",
        f"spec.{field}: {metric} needs a {kind} of {fitting} ({there}); choose another metric, or"
        " give such data (data.validation, or a larger data.split.validation)",
    )
