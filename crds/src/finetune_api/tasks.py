"""``spec.task`` and ``spec.evaluation.metrics``: tasks and metrics, and their properties.

``TASKS`` and ``METRICS`` are the single tables, as ``METHODS`` is of methods. Code reads properties
from an entry and never compares names. A spec may declare further metrics: ``Evaluation.kinds`` has
all of a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, get_args

from finetune_api.sources import Format

TaskName = Literal["CausalLM", "SequenceClassification"]
Metric = Literal[
    "Loss", "Perplexity", "ExactMatch", "Accuracy", "Precision", "Recall", "F1", "Bleu", "Rouge",
    "NormalizedExactMatch", "TokenF1", "Rouge1", "Rouge2", "ChrF", "ValidJson",
    "NumberMatch", "StrictNumberMatch", "ChoiceMatch", "JsonMatch", "JsonFieldF1",
    "InstructionFollowing",
    "LabelAccuracy", "LabelAccuracyPerToken", "LabelAccuracyPerCharacter", "CalibrationError",
]  # fmt: skip


MetricSource = Literal["Loss", "Labels", "Text", "Instructions", "LabelScores", "Scores"]
"""What a metric is computed from: token losses; predicted and true labels; generated and reference
text; generated text and the instructions of its prompt; log-likelihoods of all labels; scores of
the answers that something outside of the trainer gives."""


@dataclass(frozen=True)
class MetricKind:
    """Properties of a metric."""

    source: MetricSource
    higher_is_better: bool = True
    percent: bool = True
    """Whether it is a share of 1, shown in percent."""
    default: bool = True
    """Whether it is measured without being requested."""
    point: float = 0.01
    """A point of the metric: a hundredth of a share or of a nat; 1 where it goes from 0 to 100."""
    relative: bool = False
    """Whether it compares with the base model of the run, so that values of other runs mean other
    things."""

    @property
    def span(self) -> float | None:
        """Best value minus worst value; None: losses and other plain numbers have no limit."""
        limited = self.percent or self.source not in ("Loss", "Scores")
        return 100 * self.point if limited else None


Kinds = Mapping[str, MetricKind]
"""Metrics by name: some of ``METRICS``, and those that a spec declares."""


METRICS: Final[Kinds] = {
    "Loss": MetricKind("Loss", higher_is_better=False, percent=False),
    "Perplexity": MetricKind("Loss", higher_is_better=False, percent=False),
    "ExactMatch": MetricKind("Text"),
    "Accuracy": MetricKind("Labels"),
    "Precision": MetricKind("Labels"),
    "Recall": MetricKind("Labels"),
    "F1": MetricKind("Labels"),
    "Bleu": MetricKind("Text", percent=False, point=1.0),
    "Rouge": MetricKind("Text"),
    "NormalizedExactMatch": MetricKind("Text", default=False),
    "TokenF1": MetricKind("Text", default=False),
    "Rouge1": MetricKind("Text", default=False),
    "Rouge2": MetricKind("Text", default=False),
    "ChrF": MetricKind("Text", percent=False, default=False, point=1.0),
    "ValidJson": MetricKind("Text", default=False),
    "NumberMatch": MetricKind("Text", default=False),
    "StrictNumberMatch": MetricKind("Text", default=False),
    "ChoiceMatch": MetricKind("Text", default=False),
    "JsonMatch": MetricKind("Text", default=False),
    "JsonFieldF1": MetricKind("Text", default=False),
    "InstructionFollowing": MetricKind("Instructions", default=False),
    "LabelAccuracy": MetricKind("LabelScores", default=False),
    "LabelAccuracyPerToken": MetricKind("LabelScores", default=False),
    "LabelAccuracyPerCharacter": MetricKind("LabelScores", default=False),
    "CalibrationError": MetricKind("LabelScores", higher_is_better=False, default=False),
}


OF_BUILT_IN: Final[Metric] = "InstructionFollowing"
"""Metric of the set of verifiable instructions (``sources.BUILT_IN``), which has no other one of
answers. Other sets have it on request."""
MOST_LABELS: Final = 64
"""Labels of a set up to which their log-likelihoods are computed."""
DEFAULT_METRICS: Final = tuple(name for name, kind in METRICS.items() if kind.default)
"""Metrics that are measured without being requested, where a set has them."""


def kinds_of(*names: Metric) -> Kinds:
    """Return some of ``METRICS``."""
    return {name: METRICS[name] for name in names}


def metrics_from(*sources: MetricSource) -> tuple[str, ...]:
    """Return the metrics that are computed from any of these sources."""
    return tuple(name for name, kind in METRICS.items() if kind.source in sources)


@dataclass(frozen=True)
class TaskKind:
    """Properties of a task that do not depend on the model."""

    formats: tuple[Format, ...]
    """Supported data formats."""
    metrics: tuple[str, ...]
    """Supported metrics."""
    generates: bool
    """Whether answers are generated text."""


TASKS: Final[dict[TaskName, TaskKind]] = {
    "CausalLM": TaskKind(get_args(Format), get_args(Metric), generates=True),
    "SequenceClassification": TaskKind(
        ("Classification",), ("Loss", *metrics_from("Labels")), generates=False
    ),
}
