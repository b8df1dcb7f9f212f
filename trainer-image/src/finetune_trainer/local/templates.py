"""``finetune templates``: the library of templates, and what one of them makes of records."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
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
from finetune_trainer.prepare.catalogue import CATALOGUE, Entry
from finetune_trainer.prepare.formats import Pair
from finetune_trainer.prepare.records import read_records
from finetune_trainer.prepare.templates import LibraryTemplate

SHOWN: Final = 4
"""Records that are shown of a file."""


def list_templates(console: Console) -> int:
    """Prints every template of the library; returns the exit code."""
    table = Table(Column("template", no_wrap=True), "fields", "purpose")
    for name, entry in CATALOGUE.items():
        fields = ", ".join(f"{f} (optional)" if d.optional else f for f, d in entry.fields.items())
        table.add_row(name, fields, entry.purpose)
    console.print(table)
    return 0


def show_template(console: Console, name: str, renamed: Sequence[str], data: Path | None) -> int:
    """Prints a template, or what it makes of the first records of a file, with what is learned
    marked; returns the exit code: 2 where an argument is faulty.

    Args:
        renamed: ``own=theirs`` for fields that the records have other names for.
    """
    try:
        pairs = (field.partition("=") for field in renamed)
        fields = {own: theirs for own, _, theirs in pairs} or None
        template = Template.model_validate({"name": name, "fields": fields})
    except ValidationError as error:
        print("\n".join(explain(error, root="template")), file=sys.stderr)
        return 2
    assert template.name is not None, "the contract wants a name or texts"
    if data is None:
        _print_entry(console, CATALOGUE[template.name])
        return 0
    try:
        for where, pair in islice(_rendered(template, data), SHOWN):
            console.rule(escape(where), align="left", style="dim", characters="─")
            console.print(_marked(console, pair.prompt, pair.completion), soft_wrap=True)
    except OSError as error:
        print(f"{data}: {error.strerror}; check the path", file=sys.stderr)
        return 2
    except TrainerError as error:
        print(error.message, file=sys.stderr)
        return error.exit_code
    return 0


def _rendered(template: Template, data: Path) -> Iterator[tuple[str, Pair]]:
    """Records as training records of a split with the default seed have them."""
    renderer = LibraryTemplate(template, seed=0)
    with data.open("rb") as stream:
        for record in read_records(str(data), stream):
            yield record.where, renderer.varied(record)


def _print_entry(console: Console, entry: Entry) -> None:
    table = Table("field", "what it holds")
    for name, field in entry.fields.items():
        table.add_row(name, f"{field.what} (optional)" if field.optional else field.what)
    console.print(table)
    for i, prompt in enumerate(entry.prompts):
        held_out = " (the one of held-out records)" if i == 0 else ""
        console.rule(f"phrasing {i + 1}{held_out}", align="left", style="dim", characters="─")
        console.print(_marked(console, prompt, entry.completion), soft_wrap=True)


def _marked(console: Console, read: str, learned: str) -> Text:
    """Text with its learned part in colour, or in brackets where there is none."""
    if console.color_system is None or console.no_color:
        return Text(f"{read}⟦{learned}⟧")
    return Text.assemble((read, "dim"), (learned, "bold green"))
