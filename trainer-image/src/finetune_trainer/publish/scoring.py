"""Scores of the answers by metrics of the user's own, which publish computes: it holds no GPU, and
a failure of their code loses nothing that was trained.

    MeasuredSet ──► samples with the answers of each row ──► scores in the same rows
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from finetune_api.custom_metrics import CustomMetric
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.evaluate.custom_metrics import (
    AnsweredSample,
    MetricFunction,
    load_metrics,
    scores_of,
)
from finetune_trainer.evaluate.table import Answered
from finetune_trainer.personal import redacted
from finetune_trainer.publish.measured_sets import MeasuredSet


@dataclass(frozen=True)
class Scorer:
    """The metrics of the user's own, with their code."""

    declared: Sequence[CustomMetric]
    functions: Mapping[str, MetricFunction]
    redact: bool
    """Replace personal data in the answers, as in predictions.jsonl."""

    @classmethod
    def of(cls, spec: FineTuneJobSpec) -> Scorer:
        """The metrics that a spec declares.

        Raises:
            UserError: 'MetricNotInstalled', 'MetricFailed'.
        """
        declared = spec.evaluation.custom_metrics
        redact = spec.data.quality.personal_data == "Redact"
        return cls(declared, load_metrics(declared), redact)

    def __call__(self, found: MeasuredSet) -> MeasuredSet:
        """Return the set with the scores of all rows that have none yet.

        Raises:
            UserError: 'MetricFailed', naming set, row and sample.
        """
        wanted = [metric for metric in self.declared if metric.name in found.metrics]
        if not wanted:
            return found
        return replace(
            found,
            answered=[self._row(found, row, wanted) for row in found.answered],
            parts=[row and self._row(found, row, wanted) for row in found.parts],
        )

    def _row(self, found: MeasuredSet, row: Answered, wanted: Sequence[CustomMetric]) -> Answered:
        if not row.samples or all(metric.name in row.scores for metric in wanted):
            return row
        samples = self._samples(found, row)
        where = f"set {found.name}, row {row.row.name}"
        scores = {m.name: scores_of(m, self.functions[m.name], samples, where) for m in wanted}
        return replace(row, scores={**row.scores, **scores})

    def _samples(self, found: MeasuredSet, row: Answered) -> list[AnsweredSample]:
        return [
            AnsweredSample(
                prompt=found.references[number].prompt,
                reference=found.references[number].completion,
                label=found.references[number].label,
                answer=redacted(answer) if self.redact else answer,
                fields={name: values[number] for name, values in found.slices.items()},
            )
            for number, answer in zip(row.samples, row.answers, strict=True)
        ]
