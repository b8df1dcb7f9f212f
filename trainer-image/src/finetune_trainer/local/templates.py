"""``finetune templates``: list the template library, and render records with a template."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Final

from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from finetune_api.base import explain
from finetune_api.templates import Template
from finetune_trainer.failures import TrainerError
from finetune_trainer.prepare.reading.records import Record, read_records
from finetune_trainer.prepare.rendering.catalogue import CATALOGUE, Entry
from finetune_trainer.prepare.rendering.examples import Segment
from finetune_trainer.prepare.rendering.formats import Content, Conversation, Pair
from finetune_trainer.prepare.rendering.templates import LibraryTemplate
from finetune_trainer.prepare.rendering.turns import ChatTurns

SHOWN: Final = 4
"""Records shown from a file."""


def list_templates(console: Console) -> int:
    """Print every template of the library and return the exit code."""
    table = Table(Column("template", no_wrap=True), "fields", "purpose")
    for name, entry in CATALOGUE.items():
        fields = ", ".join(f"{f} (optional)" if d.optional else f for f, d in entry.fields.items())
        table.add_row(name, fields, entry.purpose)
    console.print(table)
    return 0


def show_template(
    console: Console,
    name: str,
    renamed: Sequence[str],
    data: Path | None,
    roles: Sequence[str] = (),
) -> int:
    """Print a template, or the first records of a file rendered with it and their supervised text
    marked. Return the exit code: 2 for an invalid argument.

    Args:
        renamed: ``field=name`` for template fields that have another name in the records.
        roles: ``name=role`` for conversation roles that have another name in the records.
    """
    try:
        template = Template.model_validate(
            {"name": name, "fields": _pairs(renamed), "roles": _pairs(roles)}
        )
    except ValidationError as error:
        print("\n".join(explain(error, Template, "template")), file=sys.stderr)
        return 2
    assert template.name is not None, "the contract wants a name or texts"
    if data is None:
        _print_entry(console, CATALOGUE[template.name])
        return 0
    try:
        for where, parts in islice(_rendered(template, data), SHOWN):
            console.rule(escape(where), align="left", style="dim", characters="─")
            console.print(_marked(console, parts), soft_wrap=True)
    except OSError as error:
        print(f"{data}: {error.strerror}; check the path", file=sys.stderr)
        return 2
    except TrainerError as error:
        print(error.message, file=sys.stderr)
        return error.exit_code
    return 0


def _pairs(given: Sequence[str]) -> dict[str, str] | None:
    parts = (text.partition("=") for text in given)
    return {name: value for name, _, value in parts} or None


def _rendered(template: Template, data: Path) -> Iterator[tuple[str, list[Segment]]]:
    """Render the records as training records of a split with the default seed."""
    read: Callable[[Record], Content] = (
        ChatTurns(template).read
        if template.name == "Chat"
        else LibraryTemplate(template, seed=0).varied
    )
    with data.open("rb") as stream:
        for record in read_records(str(data), stream):
            yield record.where, _parts(read(record))


def _parts(content: Content) -> list[Segment]:
    """Return the text segments, supervised or not. A conversation is shown as its turns; the data
    report shows them as the model's chat template renders them."""
    if isinstance(content, Pair):
        return [Segment(content.prompt, False), Segment(content.completion, True)]
    assert isinstance(content, Conversation), "a template makes pairs or conversations"
    parts = [Segment(f"tools: {_json(content.tools)}\n", False)] if content.tools else []
    for message in content.messages:
        said = [message.get("content") or "", *map(_json, message.get("tool_calls", ()))]
        learned = message["role"] == "assistant"
        parts += [
            Segment(f"{message['role']}: ", False),
            Segment("\n".join(filter(None, said)), learned),
        ]
        parts.append(Segment("\n", False))
    return parts


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _print_entry(console: Console, entry: Entry) -> None:
    table = Table("field", "what it holds")
    for name, field in entry.fields.items():
        table.add_row(name, f"{field.what} (optional)" if field.optional else field.what)
    console.print(table)
    if not entry.prompts:
        console.print("Rendered by the model's chat template; see the data report.")
    for i, prompt in enumerate(entry.prompts):
        held_out = " (used for held-out records)" if i == 0 else ""
        console.rule(f"phrasing {i + 1}{held_out}", align="left", style="dim", characters="─")
        parts = [Segment(prompt, False), Segment(entry.completion, True)]
        console.print(_marked(console, parts), soft_wrap=True)


def _marked(console: Console, parts: Sequence[Segment]) -> Text:
    """Return the text with its supervised parts in colour, or in brackets without colour."""
    if console.color_system is None or console.no_color:
        return Text("".join(f"⟦{p.text}⟧" if p.supervised else p.text for p in parts))
    return Text.assemble(*((p.text, "bold green" if p.supervised else "dim") for p in parts))
