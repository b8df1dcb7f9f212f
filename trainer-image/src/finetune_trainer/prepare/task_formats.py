"""What prepare does differently per task: content of records, tokenization, and classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from finetune_api.sources import DataSource, Format
from finetune_api.tasks import TASKS, TaskName
from finetune_trainer.failures import DataError, UserError
from finetune_trainer.prepare.reading.records import Record
from finetune_trainer.prepare.rendering.catalogue import CATALOGUE
from finetune_trainer.prepare.rendering.formats import (
    Content,
    content_of,
    detect_format,
    labelled_text,
)
from finetune_trainer.prepare.tokenizing.texts import Texts
from finetune_trainer.prepare.tokenizing.tokens import Tokenizing, Tokens
from finetune_trainer.prepared.split import Side


class Labels(Protocol):
    """The labels of the samples of a set."""

    @property
    def labels(self) -> Mapping[str, int]:
        """Number of samples with each label."""

    @property
    def label_places(self) -> Mapping[str, str]:
        """Object and line of the first sample with each label."""


def no_classes(found: Iterable[tuple[Side, Labels]], head: Sequence[str] = ()) -> list[str]:
    """Return no classes, for a task that trains labels as text."""
    return []


def classes_of(found: Iterable[tuple[Side, Labels]], head: Sequence[str] = ()) -> list[str]:
    """Return the classes: the sorted labels of the training samples (integers by value), or those
    of a head that is not trained.

    Args:
        head: classes of that head; empty where the head is trained.

    Raises:
        DataError: 'TooFewClasses'; 'UnknownLabel', with the record of a held-out label that no
            training sample has, or of a label that the head does not know.
    """
    known: set[str] = set(head)
    held_out: list[tuple[str, str]] = []
    for side, there in found:
        if side == "train" and not head:
            known.update(there.labels)
        else:
            held_out += there.label_places.items()
    if len(known) < 2:
        raise DataError(
            "TooFewClasses",
            f"the training samples have one label, {', '.join(known)}, but classification needs at"
            " least two; correct data or spec",
        )
    for label, where in held_out:
        if label in known:
            continue
        if head:
            raise DataError(
                "UnknownLabel",
                f"{where}: the model's classification head has no class {label!r}; it has"
                f" {', '.join(head)}. Correct the record, or evaluate a model of such classes",
            )
        raise DataError(
            "UnknownLabel",
            f"{where}: no training sample has the label {label!r}, so the model has no such"
            " class; correct the record, train on such records, or lower data.split",
        )
    if head:
        return list(head)
    numbers = all(label.removeprefix("-").isdecimal() for label in known)
    return sorted(known, key=lambda label: (int(label) if numbers else 0, label))


@dataclass(frozen=True)
class Rendering:
    """How prepare makes the samples of a task."""

    content: Callable[[Record, Format], Content]
    """Reads a record of a plain format without a template."""
    tokens: Callable[[Any, str, int], Tokenizing]
    """Maps tokenizer, model address and rows of the embedding to a ``Tokenizing``."""
    classes: Callable[[Iterable[tuple[Side, Labels]], Sequence[str]], list[str]]
    """Returns the names of the classes, from the labels of all sets and the classes of a head that
    is not trained."""


RENDERINGS: Final[dict[TaskName, Rendering]] = {
    "CausalLM": Rendering(content_of, Tokens, no_classes),
    "SequenceClassification": Rendering(labelled_text, Texts, classes_of),
}


def stated_format(spec: DataSource, task: TaskName) -> Format | None:
    """Return the format of a source if the spec decides it, else None.

    Raises:
        UserError: 'FormatNotForTask'.
    """
    formats = TASKS[task].formats
    if spec.format is not None:
        return _fitting(spec.format, task, spec.source)
    if spec.template is None:
        return None
    if spec.template.name is not None:
        return _fitting(CATALOGUE[spec.template.name].format, task, spec.source)
    return "PromptCompletion" if "PromptCompletion" in formats else formats[0]


def format_of(spec: DataSource, first: Record, task: TaskName) -> Format:
    """Return the format of a source, from the spec or its first record.

    Raises:
        DataError: 'UnknownFormat', neither spec nor record decide it.
        UserError: 'FormatNotForTask'.
    """
    return stated_format(spec, task) or _fitting(detect_format(first), task, first.where)


def _fitting(found: Format, task: TaskName, where: str) -> Format:
    formats = TASKS[task].formats
    if found not in formats:
        raise UserError(
            "FormatNotForTask",
            f"{where}: this is of format {found}, but spec.task {task} needs {', '.join(formats)}"
            " (text and label); give such records, or a template whose prompt is the text and whose"
            " completion is the label",
        )
    return found
