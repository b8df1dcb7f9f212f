"""``spec.task``: the tasks and their properties.

``TASKS`` is the single table of tasks, as ``METHODS`` is of methods. Code reads a task's properties
from its entry and never compares names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

from finetune_api.sources import Format

TaskName = Literal["CausalLM", "SequenceClassification"]
Metric = Literal[
    "Loss", "Perplexity", "ExactMatch", "Accuracy", "Precision", "Recall", "F1", "Bleu", "Rouge"
]


@dataclass(frozen=True)
class TaskKind:
    """Properties of a task that do not depend on the model."""

    formats: tuple[Format, ...]
    """Supported data formats."""
    metrics: tuple[Metric, ...]
    """Supported metrics."""
    generates: bool
    """Whether answers are generated text."""


TASKS: Final[dict[TaskName, TaskKind]] = {
    "CausalLM": TaskKind(get_args(Format), get_args(Metric), generates=True),
    "SequenceClassification": TaskKind(
        ("Classification",), ("Loss", "Accuracy", "Precision", "Recall", "F1"), generates=False
    ),
}
