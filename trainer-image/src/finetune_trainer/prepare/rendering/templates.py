"""Renders records with templates: Jinja in a sandbox; a missing field is an error with its name.

A library template has several phrasings. The phrasing of a training record is a pure function of
the split's seed and the record's first phrasing: independent of order and file, and equal for
records with the same question. Held-out records use the first phrasing, and the first phrasing is
the group of the split, so prompts of the final test do not depend on the draw.
"""

from __future__ import annotations

import json
from typing import Any, Final

import jinja2
import jinja2.meta
import jinja2.nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finetune_api.templates import Template
from finetune_trainer.failures import DataError, UserError
from finetune_trainer.personal import redacted
from finetune_trainer.prepare.reading.records import Fields, Record
from finetune_trainer.prepare.rendering.catalogue import CATALOGUE
from finetune_trainer.prepare.rendering.formats import Pair, missing_field
from finetune_trainer.prepare.rendering.limits import RENDER_ERRORS, check_length, has_power
from finetune_trainer.prepared.split import position


class _NullField(Exception):
    """A template wrote a field whose value is null."""


def _written(value: Any) -> Any:
    """Return the form of a value that templates write."""
    if value is None:  # Jinja would write, and the model learn, the word None
        raise _NullField
    if isinstance(value, bool | list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return value


_ENVIRONMENT: Final = ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined,
    finalize=_written,
    keep_trailing_newline=True,
    autoescape=False,
)


class LibraryTemplate:
    """Renders records by a library template.

    Args:
        template: a template with a name.
        seed: of the split; it also draws the phrasings.
    """

    def __init__(self, template: Template, seed: int) -> None:
        assert template.name is not None, "a template of one's own is a PairTemplate"
        entry = CATALOGUE[template.name]
        renamed = template.fields or {}
        self._name, self._seed = template.name, seed
        self._theirs = {own: renamed.get(own, own) for own in entry.fields}
        # An optional field that template.fields maps is required.
        self._spared = {f for f, field in entry.fields.items() if field.optional} - set(renamed)
        self._prompts = [_ENVIRONMENT.from_string(text) for text in entry.prompts]
        self._completion = _ENVIRONMENT.from_string(entry.completion)

    def first(self, record: Record) -> Pair:
        """Render a record in the first phrasing.

        Raises:
            DataError: 'MissingField', with object, line and field.
        """
        return self._pair(self._values(record), drawn=False)

    def varied(self, record: Record) -> Pair:
        """Render a record in the phrasing drawn for it.

        Raises:
            DataError: see ``first``.
        """
        return self._pair(self._values(record), drawn=True)

    def _pair(self, values: Fields, *, drawn: bool) -> Pair:
        prompt = subject = self._prompts[0].render(values)
        if drawn:
            at = position(self._seed, f"phrasing\0{subject}")
            prompt = self._prompts[int(at * len(self._prompts))].render(values)
        own = "\n".join(str(_written(value)) for value in values.values())
        return Pair(prompt, self._completion.render(values), subject, own)

    def _values(self, record: Record) -> Fields:
        values = {own: record.fields.get(theirs) for own, theirs in self._theirs.items()}
        for own, value in values.items():
            if value is None and own not in self._spared:
                theirs = self._theirs[own]
                state = "null" if theirs in record.fields else "missing"
                named = "" if own == theirs else f" as {own}"
                why = f"is {state} (template {self._name} needs it{named}; see template.fields)"
                raise missing_field(record, theirs, why)
        return {own: "" if value is None else value for own, value in values.items()}


class PairTemplate:
    """Renders a record to prompt and completion by a user's template.

    Raises:
        UserError: 'BadTemplate', the template is not valid Jinja.
    """

    def __init__(self, template: Template) -> None:
        assert template.prompt and template.completion, "one with a name is a LibraryTemplate"
        self._prompt = _Text("prompt", template.prompt)
        self._completion = _Text("completion", template.completion)

    def render(self, record: Record) -> Pair:
        """Render prompt and completion of a record. Templates are untrusted: render within
        ``limits.limited_work``.

        Raises:
            DataError: 'MissingField' or 'TemplateFailed', with object, line and field.
            UserError: 'BadTemplate', the template does something that the sandbox forbids.
        """
        prompt, asked = self._prompt.render(record)
        completion, answered = self._completion.render(record)
        return Pair(prompt, completion, own=f"{asked}\n{answered}")


class _Text:
    """One compiled template text."""

    def __init__(self, name: str, source: str) -> None:
        self._name = name
        try:
            if has_power(source):
                raise UserError(
                    "BadTemplate", f"template.{name}: it must not raise to a power (**); got"
                    f" {source!r}",
                )  # fmt: skip
            tree = _ENVIRONMENT.parse(source)
            self._needed = sorted(jinja2.meta.find_undeclared_variables(tree))
            self._compiled = _ENVIRONMENT.from_string(source)
            for literal in tree.find_all(jinja2.nodes.TemplateData):
                literal.data = " "
            self._values = _ENVIRONMENT.from_string(tree)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                "BadTemplate",
                f"template.{name}, line {error.lineno}: {error.message}; got {source!r}",
            ) from None
        except (RecursionError, SyntaxError):
            raise UserError("BadTemplate", f"template.{name}: it is nested too deeply") from None

    def render(self, record: Record) -> tuple[str, str]:
        """Return the text for a record, and the record's values in it without template text."""
        fields = {"record": record.fields, **record.fields}
        try:
            text, values = self._compiled.render(fields), self._values.render(fields)
        except jinja2.UndefinedError as error:
            missing = [name for name in self._needed if name not in fields]
            if missing:
                why = f"is missing (template.{self._name} needs it)"
                raise missing_field(record, missing[0], why) from None
            raise DataError(
                "MissingField", f"{record.where}: template.{self._name}: {error.message}"
            ) from None
        except _NullField:
            null = [name for name, value in record.fields.items() if value is None]
            null = [name for name in null if name in self._needed] or null
            why = f"is null (template.{self._name} writes it)"
            raise missing_field(record, null[0] if null else "?", why) from None
        except SecurityError as error:
            raise UserError("BadTemplate", f"template.{self._name}: {error}") from None
        except RENDER_ERRORS as error:
            raise DataError(
                "TemplateFailed",
                f"{record.where}: template.{self._name} fails on this record:"
                f" {redacted(str(error))}. Correct the record or the template",
            ) from None
        check_length(record.where, len(text))
        return text, values
