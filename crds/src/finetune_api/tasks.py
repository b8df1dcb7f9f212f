"""``spec.task``: what the model learns to give, and what follows from it.

``TASKS`` is the one table of the tasks, as ``METHODS`` is of the methods: whoever needs to know
what goes with a task asks its row, and nobody compares names.
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
    """What can be said of a task without a model."""

    formats: tuple[Format, ...]
    """Formats of data that it learns from."""
    metrics: tuple[Metric, ...]
    """What can be measured."""
    generates: bool
    """Whether answers are text that is generated, token by token."""


TASKS: Final[dict[TaskName, TaskKind]] = {
    "CausalLM": TaskKind(get_args(Format), get_args(Metric), generates=True),
    "SequenceClassification": TaskKind(
        ("Classification",), ("Loss", "Accuracy", "Precision", "Recall", "F1"), generates=False
    ),
}
