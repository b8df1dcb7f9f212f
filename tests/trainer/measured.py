"""Made test sets, with what each row answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from finetune_api.evaluation_results import Row
from finetune_api.tasks import Metric, kinds_of
from finetune_trainer.evaluate.table import Answered
from finetune_trainer.prepared.dataset import Reference
from finetune_trainer.publish.measured_sets import MeasuredSet


def measured_set(
    references: Sequence[str],
    answers: Mapping[Row, Sequence[str]],
    metrics: Sequence[Metric] = ("Loss", "ExactMatch"),
    *,
    name: str = "set",
    prompts: Sequence[str] | None = None,
    digests: Sequence[str] | None = None,
) -> MeasuredSet:
    """A set whose rows have answered its first samples; each sample is a group."""
    asked = prompts or [f"p{n}" for n in range(len(references))]
    return MeasuredSet(
        name=name, retention=False, metrics=kinds_of(*metrics), slices={},
        groups=np.arange(len(references)),
        digests=digests or [f"d{n}" for n in range(len(references))],
        references=[
            Reference(np.zeros(1, np.int32), prompt, text, None)
            for prompt, text in zip(asked, references, strict=True)
        ],
        answered=[Answered(row, range(len(said)), said) for row, said in answers.items()],
    )  # fmt: skip
