"""Template Chat: reads conversations of other shapes like those of format Messages.

A turn has a role and content under any field names, or is a pair of prompt and response. The usual
role names are known; the manifest maps others. Roles are never guessed: a wrong role changes which
turns are supervised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from finetune_api.templates import TEMPLATE_FIELDS, Template
from finetune_trainer.prepare.reading.records import Record
from finetune_trainer.prepare.rendering.catalogue import CHAT_ROLES
from finetune_trainer.prepare.rendering.conversations import Turn, conversation, is_list
from finetune_trainer.prepare.rendering.formats import (
    Conversation,
    field_value,
    missing_field,
    text_value,
    unknown_role,
    wrong_type,
)


class ChatTurns:
    """Reads conversations by the field and role names of a template."""

    def __init__(self, template: Template) -> None:
        assert template.name == "Chat", "others make pairs"
        renamed = template.fields or {}
        self._theirs = {own: renamed.get(own, own) for own in TEMPLATE_FIELDS["Chat"]}
        # An optional field that template.fields maps is required.
        self._wanted = [self._theirs[own] for own in ("system", "tools") if own in renamed]
        self._roles = {**CHAT_ROLES, **(template.roles or {})}

    def read(self, record: Record) -> Conversation:
        """Read the conversation of a record.

        Raises:
            DataError: 'MissingField', 'WrongType' or 'UnknownRole', with object, line and field.
        """
        for field in self._wanted:
            field_value(record, field)
        return conversation(record, list(self._turns(record)), tools=self._theirs["tools"])

    def _turns(self, record: Record) -> Iterator[Turn]:
        field, system = self._theirs["messages"], self._theirs["system"]
        given = field_value(record, field)
        if not is_list(given) or not given:
            raise wrong_type(record, field, "a list of at least one turn", given)
        turns = [
            t for i, turn in enumerate(given) for t in self._turn(record, f"{field}[{i}]", turn)
        ]
        if record.fields.get(system):
            if turns[0].message["role"] == "system":
                raise wrong_type(
                    record, system, "absent where the first turn is the system's", given[0]
                )
            yield Turn(system, {"role": "system", "content": text_value(record, system)}, system)
        yield from turns

    def _turn(self, record: Record, name: str, turn: Any) -> list[Turn]:
        role, content, prompt, response = (
            self._theirs[own] for own in ("role", "content", "prompt", "response")
        )
        if is_list(turn) and len(turn) == 2:
            return _round(record, {f"{name}[0]": turn[0], f"{name}[1]": turn[1]})
        if not isinstance(turn, Mapping):
            wanted = f"an object of {role} and {content}, or of {prompt} and {response}, or a pair"
            raise wrong_type(record, name, wanted, turn)
        if turn.get(role) is None and turn.get(prompt) is not None:
            return _round(record, {f"{name}.{key}": turn.get(key) for key in (prompt, response)})
        if turn.get(role) is None:
            raise missing_field(record, f"{name}.{role}")
        said = turn[role]
        if not isinstance(said, str) or said not in self._roles:
            raise unknown_role(record, f"{name}.{role}", said, self._roles)
        message = {key: value for key, value in turn.items() if key not in (role, content)}
        message |= {"role": self._roles[said], "content": turn.get(content)}
        return [Turn(name, message, f"{name}.{content}")]


def _round(record: Record, said: Mapping[str, Any]) -> list[Turn]:
    """Return the turns of a pair: a user turn and an assistant turn."""
    turns = []
    for role, (name, text) in zip(("user", "assistant"), said.items(), strict=True):
        if text is None:
            raise missing_field(record, name)
        turns.append(Turn(name, {"role": role, "content": text}, name))
    return turns
