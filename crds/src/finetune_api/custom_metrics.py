"""``spec.evaluation.customMetrics``: metrics of the user's own, which the trainer image computes.

A manifest declares what a metric's values mean, so that gates, tables and published results are
read without its code.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, ClassVar, Final

from finetune_api.base import Model, Rule, Spelling
from finetune_api.judge import WIN_RATE, WIN_RATE_KIND
from finetune_api.tasks import METRICS, Kinds, MetricKind

METRIC_GROUP: Final = "finetune_trainer.metrics"
"""Group of the entry points that compute custom metrics."""
MetricName = Annotated[
    str, Spelling(r"^[A-Z][A-Za-z0-9]*$", "a CamelCase word: WordErrorRate", max_length=63)
]


_TAKEN: Final = [*METRICS, WIN_RATE]


class CustomMetric(Model):
    """A metric of the user's own: a score of each answer, by a Python function in the trainer
    image. The value of a set is the mean over its answers."""

    name: MetricName
    """Name of the metric, and of its entry point in group `finetune_trainer.metrics`: a function
    that takes a list of samples, each a dict with prompt, reference, label, answer (as in
    predictions.jsonl) and fields (values of evaluation.slices), and returns a number for each."""
    higher_is_better: bool = True
    """Whether a higher score is a better one."""
    percent: bool = True
    """Whether scores are shares from 0 to 1, shown in percent; a point of evaluation.minEffect is a
    hundredth. If false, they are any finite numbers, and a point is 1."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            f"!(self.name in {_TAKEN})",
            "the trainer has a metric of this name: give yours another, or use it by"
            " evaluation.metrics or evaluation.judge",
            lambda m: m.name not in _TAKEN,
            ("name",),
        ),
    )

    @property
    def kind(self) -> MetricKind:
        """Properties of the metric."""
        return MetricKind(
            "Scores", self.higher_is_better, self.percent, default=False,
            point=0.01 if self.percent else 1.0,
        )  # fmt: skip


def with_declared(declared: Iterable[CustomMetric], *, judged: bool = False) -> Kinds:
    """Return ``METRICS`` and the declared metrics.

    Args:
        judged: whether there is a judge.
    """
    found = {**METRICS, **{metric.name: metric.kind for metric in declared}}
    return found | {WIN_RATE: WIN_RATE_KIND} if judged else found
