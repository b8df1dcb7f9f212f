"""What a record holds: prompt and completion, a conversation, or plain text.

The format of a source is found out from its first record where the manifest names none. Nothing is
guessed beyond that: a field that is missing or of another type is an error that names it. Formats
with more to them are read in ``conversations`` and ``retrieval``, records of other fields in
``templates``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from finetune_api.sources import Format
from finetune_trainer.failures import DataError
from finetune_trainer.prepare.quality.personal import excerpt, redacted
from finetune_trainer.prepare.reading.records import Record, is_broken

FORMAT_FIELDS: Final[dict[Format, tuple[str, ...]]] = {
    "Messages": ("messages",),
    "PromptCompletion": ("prompt", "completion"),
    "Instruction": ("instruction", "output"),
    "Classification": ("text", "label"),
    "Retrieval": ("question", "oracle", "answer"),
    "Text": ("text",),
}
"""Fields that a record of each format must have. The first format whose fields are all there is
the one that is found out."""

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt that is read and a completion that is learned."""

    prompt: str
    completion: str
    subject: str | None = None
    """What is asked, however the prompt puts it. None: the prompt itself."""
    own: str | None = None
    """The record's own words in both, without a template's. None: subject and completion."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns, each with a role, and content or calls of tools."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    """The tools that may be called, as JSON schemas."""


@dataclass(frozen=True, slots=True)
class Document:
    """Text that is learned as a whole."""

    text: str


Content = Pair | Conversation | Document


def detect_format(record: Record) -> Format:
    """Format of a source without ``format`` and ``template``, from its first record.

    Raises:
        DataError: 'UnknownFormat' where no format's fields are there.
    """
    for name, fields in FORMAT_FIELDS.items():
        if all(record.fields.get(field) is not None for field in fields):
            return name
    known = "; ".join(f"{name}: {', '.join(fields)}" for name, fields in FORMAT_FIELDS.items())
    raise DataError(
        "UnknownFormat",
        f"{record.where}: its fields ({names_of(record)}) are those of no format ({known}); set"
        " template on the data source to say how prompt and completion are made of them (`finetune"
        " templates` lists those that have a name)",
    )


def content_of(record: Record, form: Format) -> Content:
    """The content of a record of a plain format (not Messages, not Retrieval).

    Raises:
        DataError: 'MissingField' or 'WrongType', naming object, line and field.
    """
    if form == "PromptCompletion":
        return Pair(text_value(record, "prompt"), text_value(record, "completion"))
    if form == "Instruction":
        parts = [text_value(record, "instruction")]
        if record.fields.get("input"):
            parts.append(text_value(record, "input"))
        return Pair("\n\n".join([*parts, ""]), text_value(record, "output"))
    if form == "Classification":
        # The space belongs to the label: vocabularies hold words with the space before them.
        return Pair(f"{text_value(record, 'text')}\nLabel:", f" {_label(record)}")
    return Document(text_value(record, "text"))


def labelled_text(record: Record, form: Format) -> Pair:
    """Text and label of a record as they are, for a model that gives classes.

    Raises:
        DataError: as ``content_of``.
    """
    return Pair(text_value(record, "text"), _label(record))


def group_value(record: Record, field: str) -> str:
    """The value of the field that ``split.groupBy`` names, as text.

    Raises:
        DataError: 'MissingField'.
    """
    return json.dumps(field_value(record, field), sort_keys=True, ensure_ascii=False, default=str)


def names_of(record: Record) -> str:
    """The record's field names, for messages."""
    return redacted(", ".join(str(name) for name in list(record.fields)[:20]))


def missing_field(record: Record, field: str, why: str = "is missing") -> DataError:
    """The error of a record without a needed field."""
    return DataError(
        "MissingField",
        f"{record.where}: field {field!r} {why}; the record has {names_of(record)}. Correct the"
        " record, or set format or template on the data source",
    )


def field_value(record: Record, field: str) -> Any:
    """The value of a field that a record must have.

    Raises:
        DataError: 'MissingField'.
    """
    value = record.fields.get(field)
    if value is None:
        raise missing_field(record, field, "is null" if field in record.fields else "is missing")
    return value


def text_value(record: Record, field: str) -> str:
    """The text of a field that a record must have.

    Raises:
        DataError: 'MissingField' or 'WrongType'.
    """
    value = field_value(record, field)
    if not isinstance(value, str):
        raise wrong_type(record, field, "a string", value)
    return value


def _label(record: Record) -> str:
    value = field_value(record, "label")
    if isinstance(value, bool):
        return json.dumps(value)
    if not isinstance(value, str | int):
        raise wrong_type(record, "label", "a string, a whole number or a boolean", value)
    return str(value)


def unknown_role(record: Record, field: str, role: Any, known: Iterable[str]) -> DataError:
    """The error of a turn whose role is none that is ``known``."""
    return DataError(
        "UnknownRole",
        f"{record.where}: field {field!r} must be one of {', '.join(known)}; got {_shown(role)}."
        " Correct the record, or say which role it is in template.roles, e.g. {bot: assistant}",
    )


def wrong_type(record: Record, field: str, wanted: str, value: Any) -> DataError:
    """The error of a field whose value is not what is ``wanted``."""
    return DataError(
        "WrongType",
        f"{record.where}: field {field!r} must be {wanted}; got {_shown(value)}. Correct the"
        " record, or set format or template on the data source",
    )


def _shown(value: Any) -> str:
    return excerpt(json.dumps(value, ensure_ascii=False, default=str))


def from_json(text: str) -> Any:
    """What a text says as JSON; None where it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return None if is_broken(value) else value
