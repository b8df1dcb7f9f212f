"""Tries the metrics of the user's own on reference answers, before GPUs are held for answers that
they cannot score."""

from __future__ import annotations

from typing import Final

import numpy as np

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.evaluate.custom_metrics import AnsweredSample, load_metrics, scores_of
from finetune_trainer.evaluate.metric_selection import measured_on
from finetune_trainer.failures import UserError
from finetune_trainer.prepared.dataset import PreparedData
from finetune_trainer.prepared.split import TESTED, Side

TRIED: Final = 8
"""Samples of each set whose reference answers are scored."""


def check_custom_metrics(spec: FineTuneJobSpec, data: PreparedData) -> None:
    """Check that the code of each metric is there, and scores reference answers.

    Raises:
        UserError: 'MetricNotInstalled', 'MetricFailed'; 'MetricWithoutData', no test or retention
            set has answers.
    """
    declared = spec.evaluation.custom_metrics
    functions = load_metrics(declared)
    tried = False
    for side in TESTED:
        for number, name in data.set_names(side):
            wanted = measured_on(data.manifest.sets[number], spec)
            samples = _samples(data, side, number, spec) if declared else []
            for metric in declared:
                if metric.name in wanted and samples:
                    tried = True
                    where = f"set {name}, answers equal to the references"
                    scores_of(metric, functions[metric.name], samples, where)
    if declared and not tried:
        raise UserError(
            "MetricWithoutData",
            f"spec.evaluation.customMetrics: {declared[0].name} needs a test or retention set of"
            " any format but Text, with samples; give data.test, or a data.split.test above 0",
        )


def _samples(
    data: PreparedData, side: Side, number: int, spec: FineTuneJobSpec
) -> list[AnsweredSample]:
    """The first samples of a set, with their references as answers."""
    positions = np.flatnonzero(data.index(side).set == number)[:TRIED].tolist()
    fields = data.slices() if side == "test" and spec.evaluation.slices else {}
    return [
        AnsweredSample(
            prompt=reference.prompt,
            reference=reference.completion,
            label=reference.label,
            answer=reference.completion if reference.label is None else reference.label,
            fields={name: values[at] for name, values in fields.items()},
        )
        for at, reference in zip(positions, data.references(side, positions), strict=True)
    ]
