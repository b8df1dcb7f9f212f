"""Reads conversations from records: turns of any role, tool calls, and tools.

The messages of provider APIs are normalized to the form that chat templates expect: content in text
parts is joined, JSON strings (tools, arguments of a call) are parsed. Otherwise templates would
write lists and quoted JSON, and the model would be trained on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from finetune_trainer.prepare.reading.records import Record
from finetune_trainer.prepare.rendering.formats import (
    Conversation,
    Message,
    field_value,
    from_json,
    missing_field,
    wrong_type,
)


class Turn(NamedTuple):
    """One turn of a record, with the names of its fields for error messages."""

    name: str
    message: Any
    """In a valid record, an object of role, and content or tool calls."""
    content: str
    """Name of its content field."""


def conversation_of(record: Record) -> Conversation:
    """Read the conversation of a record of format Messages.

    Raises:
        DataError: 'MissingField' or 'WrongType', with object, line and field.
    """
    turns = field_value(record, "messages")
    if not is_list(turns) or not turns:
        raise wrong_type(record, "messages", "a list of at least one message", turns)
    named = ((f"messages[{i}]", turn) for i, turn in enumerate(turns))
    return conversation(record, [Turn(name, turn, f"{name}.content") for name, turn in named])


def conversation(record: Record, turns: Sequence[Turn], tools: str = "tools") -> Conversation:
    """Normalize turns. The tools are those of the record's field ``tools``, else of the first turn
    with a field of that name.

    Raises:
        DataError: see ``conversation_of``.
    """
    messages = [_message(record, *turn) for turn in turns]
    given = {tools: record.fields.get(tools)}
    given |= {f"{turn.name}.tools": m.get("tools") for turn, m in zip(turns, messages, strict=True)}
    field, found = next(((f, t) for f, t in given.items() if t), (tools, None))
    return Conversation(messages, _tools(record, field, found) if found else None)


def function_of(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the function of a tool or tool call; some records wrap it in ``function``."""
    inner = call.get("function")
    return inner if isinstance(inner, Mapping) else call


def _message(record: Record, name: str, turn: Any, content: str) -> Message:
    if not isinstance(turn, Mapping):
        raise wrong_type(record, name, "an object of role and content", turn)
    message = {key: value for key, value in turn.items() if value is not None}
    calls = message.pop("tool_calls", None)
    for key, named in (("role", f"{name}.role"), ("content", content)):
        if key not in message and not (calls and key == "content"):
            raise missing_field(record, named)
    if not isinstance(message["role"], str):
        raise wrong_type(record, f"{name}.role", "a string", message["role"])
    weight = message.get("weight", 1)
    if message["role"] == "assistant" and weight not in (0, 1):
        raise wrong_type(record, f"{name}.weight", "0 (not trained) or 1 (trained)", weight)
    if "content" in message:
        message["content"] = _content(record, content, message["content"])
    if calls:
        message["tool_calls"] = _calls(record, f"{name}.tool_calls", calls)
    return message


def _content(record: Record, name: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if is_list(content) else [None]
    found = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    texts = [text for text in found if isinstance(text, str)]
    if len(texts) < len(parts):
        raise wrong_type(record, name, "a string, or a list of parts with text", content)
    return "".join(texts)


def _calls(record: Record, name: str, calls: Any) -> list[Any]:
    if not is_list(calls) or not all(map(_is_named, calls)):
        raise wrong_type(record, name, "a list of calls, each with the function's name", calls)
    return [_call(record, f"{name}[{i}]", call) for i, call in enumerate(calls)]


def _call(record: Record, name: str, call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = function_of(call)
    arguments = _parsed(function.get("arguments") or {})
    if not isinstance(arguments, Mapping):
        raise wrong_type(record, f"{name}.arguments", "a JSON object", function["arguments"])
    parsed = {**function, "arguments": arguments}
    return parsed if function is call else {**call, "function": parsed}


def _tools(record: Record, name: str, given: Any) -> list[dict[str, Any]]:
    tools = _parsed(given)
    if not is_list(tools) or not tools or not all(map(_is_named, tools)):
        raise wrong_type(record, name, "a list of tools, each with the function's name", given)
    return list(tools)


def _is_named(tool: Any) -> bool:
    return isinstance(tool, dict) and isinstance(function_of(tool).get("name"), str)


def is_list(value: Any) -> bool:
    """Whether a value is a sequence (Parquet has its own list type) other than a string."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def _parsed(value: Any) -> Any:
    """Parse a string as JSON (None where it is not JSON); return other values as they are."""
    return from_json(value) if isinstance(value, str) else value
