"""Content of a record: prompt and completion, a conversation, or plain text.

Without a format in the manifest, the first record of a source decides it. Nothing else is guessed:
a missing field or wrong type is an error with the field's name. ``conversations`` and ``retrieval``
read the formats Messages and Retrieval, ``templates`` records with other fields.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from finetune_api.sources import Format
from finetune_trainer.failures import DataError
from finetune_trainer.personal import excerpt, redacted
from finetune_trainer.prepare.reading.records import Record, is_broken
from finetune_trainer.prepared.slices import NONE

FORMAT_FIELDS: Final[dict[Format, tuple[str, ...]]] = {
    "Messages": ("messages",),
    "PromptCompletion": ("prompt", "completion"),
    "Instruction": ("instruction", "output"),
    "Classification": ("text", "label"),
    "Retrieval": ("question", "oracle", "answer"),
    "Text": ("text",),
}
"""Required fields of each format. Detection takes the first format whose fields all exist."""

SLICE_VALUE: Final = 64
"""Characters of a value of ``evaluation.slices`` that are kept."""

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and a supervised completion."""

    prompt: str
    completion: str
    subject: str | None = None
    """The question independent of the prompt's phrasing. None: the prompt itself."""
    own: str | None = None
    """The record's own text in both, without template text. None: subject and completion."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns, each with a role, and content or tool calls."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    """The tools that may be called, as JSON schemas."""


@dataclass(frozen=True, slots=True)
class Document:
    """Text that is supervised as a whole."""

    text: str


Content = Pair | Conversation | Document


def detect_format(record: Record) -> Format:
    """Detect the format of a source without ``format`` and ``template``, from its first record.

    Raises:
        DataError: 'UnknownFormat', the record has not all fields of any format.
    """
    for name, fields in FORMAT_FIELDS.items():
        if all(record.fields.get(field) is not None for field in fields):
            return name
    known = "; ".join(f"{name}: {', '.join(fields)}" for name, fields in FORMAT_FIELDS.items())
    raise DataError(
        "UnknownFormat",
        f"{record.where}: its fields ({names_of(record)}) match no format ({known}); set template"
        " on the data source to make prompt and completion of them (`finetune templates` lists the"
        " named templates)",
    )


def content_of(record: Record, form: Format) -> Content:
    """Return the content of a record of a plain format (not Messages, not Retrieval).

    Raises:
        DataError: 'MissingField' or 'WrongType', with object, line and field.
    """
    if form == "PromptCompletion":
        return Pair(text_value(record, "prompt"), text_value(record, "completion"))
    if form == "Instruction":
        parts = [text_value(record, "instruction")]
        if record.fields.get("input"):
            parts.append(text_value(record, "input"))
        return Pair("\n\n".join([*parts, ""]), text_value(record, "output"))
    if form == "Classification":
        # The space belongs to the label: vocabularies hold words with a leading space.
        return Pair(f"{text_value(record, 'text')}\nLabel:", f" {_label(record)}")
    return Document(text_value(record, "text"))


def labelled_text(record: Record, form: Format) -> Pair:
    """Return text and label of a record unchanged, for a classification head.

    Raises:
        DataError: see ``content_of``.
    """
    return Pair(text_value(record, "text"), _label(record))


def group_value(record: Record, field: str) -> str:
    """Return the value of the ``split.groupBy`` field, as JSON.

    Raises:
        DataError: 'MissingField'.
    """
    return json.dumps(field_value(record, field), sort_keys=True, ensure_ascii=False, default=str)


def slice_values(record: Record, fields: Sequence[str]) -> tuple[str, ...]:
    """Return the values of the fields of ``evaluation.slices`` as short texts without personal
    data: reports show them."""
    return tuple(_slice_value(record.fields.get(field)) for field in fields)


def _slice_value(value: Any) -> str:
    if value is None:
        return NONE
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(redacted(text).split()).encode(errors="replace").decode()
    return NONE if not text else text if len(text) <= SLICE_VALUE else text[:SLICE_VALUE] + "…"


def names_of(record: Record) -> str:
    """The record's field names, redacted, for messages."""
    return redacted(", ".join(str(name) for name in list(record.fields)[:20]))


def missing_field(record: Record, field: str, why: str = "is missing") -> DataError:
    """Return the error of a record without a required field."""
    return DataError(
        "MissingField",
        f"{record.where}: field {field!r} {why}; the record has {names_of(record)}. Correct the"
        " record, or set format or template on the data source",
    )


def field_value(record: Record, field: str) -> Any:
    """Return the value of a required field.

    Raises:
        DataError: 'MissingField'.
    """
    value = record.fields.get(field)
    if value is None:
        raise missing_field(record, field, "is null" if field in record.fields else "is missing")
    return value


def text_value(record: Record, field: str) -> str:
    """Return the text of a required field.

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
    """Return the error of a turn whose role is not in ``known``."""
    return DataError(
        "UnknownRole",
        f"{record.where}: field {field!r} must be one of {', '.join(known)}; got {_shown(role)}."
        " Correct the record, or map the role in template.roles, e.g. {bot: assistant}",
    )


def wrong_type(record: Record, field: str, wanted: str, value: Any) -> DataError:
    """Return the error of a field whose value is not ``wanted``."""
    return DataError(
        "WrongType",
        f"{record.where}: field {field!r} must be {wanted}; got {_shown(value)}. Correct the"
        " record, or set format or template on the data source",
    )


def _shown(value: Any) -> str:
    return excerpt(json.dumps(value, ensure_ascii=False, default=str))


def from_json(text: str) -> Any:
    """Parse a text as JSON; None where it is not JSON or holds an unpaired surrogate."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return None if is_broken(value) else value
