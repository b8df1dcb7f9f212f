"""What a task asks of prepare: which text records have, what samples are made of it, which classes
there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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
        """How many samples have each."""

    @property
    def label_places(self) -> Mapping[str, str]:
        """Object and line of the first of them."""


def no_classes(found: Iterable[tuple[Side, Labels]]) -> list[str]:
    """Of a task whose labels are text like any other."""
    return []


def classes_of(found: Iterable[tuple[Side, Labels]]) -> list[str]:
    """The classes: the labels of the training samples, in order (numbers by their size).

    Raises:
        DataError: 'TooFewClasses'; 'UnknownLabel', naming the record of a held-out label that no
            training sample has.
    """
    known: set[str] = set()
    held_out: list[tuple[str, str]] = []
    for side, there in found:
        if side == "train":
            known.update(there.labels)
        else:
            held_out += there.label_places.items()
    if len(known) < 2:
        raise DataError(
            "TooFewClasses",
            f"the training samples have one label, {', '.join(known)}: there is nothing to tell"
            " apart; correct data or spec",
        )
    for label, where in held_out:
        if label not in known:
            raise DataError(
                "UnknownLabel",
                f"{where}: no training sample has the label {label!r}, so the model has no such"
                " class; correct the record, train on such records, or lower data.split",
            )
    numbers = all(label.removeprefix("-").isdecimal() for label in known)
    return sorted(known, key=lambda label: (int(label) if numbers else 0, label))


@dataclass(frozen=True)
class Rendering:
    """How the samples of a task are made."""

    content: Callable[[Record, Format], Content]
    """Content of a record of a plain format that has no template."""
    tokens: Callable[[Any, str, int], Tokenizing]
    """Tokenizer, the model's address, rows of its embedding → what makes samples of examples."""
    classes: Callable[[Iterable[tuple[Side, Labels]]], list[str]]
    """Names of the classes, from what was found in each set."""


RENDERINGS: Final[dict[TaskName, Rendering]] = {
    "CausalLM": Rendering(content_of, Tokens, no_classes),
    "SequenceClassification": Rendering(labelled_text, Texts, classes_of),
}


def stated_format(spec: DataSource, task: TaskName) -> Format | None:
    """Format of a source, where its records need not be asked.

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
    """Format of a source whose first record is given.

    Raises:
        DataError: 'UnknownFormat' where neither spec nor record tell.
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
