"""Users' templates: Jinja in a sandbox, where a field that a record lacks is an error by name."""

from __future__ import annotations

from typing import Any, Final

import jinja2
import jinja2.meta
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finetune_api.sources import Template
from finetune_trainer.failures import DataError, UserError
from finetune_trainer.prepare.formats import Pair, missing_field
from finetune_trainer.prepare.records import Record


class _NullField(Exception):
    """A template wrote a field whose value is null."""


def _refuse_null(value: Any) -> Any:
    if value is None:  # would be written as the word None, and learned
        raise _NullField
    return value


_ENVIRONMENT: Final = ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined,
    finalize=_refuse_null,
    keep_trailing_newline=True,
    autoescape=False,
)


class PairTemplate:
    """Renders a record to prompt and completion.

    Raises:
        UserError: 'BadTemplate' where the template is no Jinja.
    """

    def __init__(self, template: Template) -> None:
        self._prompt = _Text("prompt", template.prompt)
        self._completion = _Text("completion", template.completion)

    def render(self, record: Record) -> Pair:
        """Prompt and completion of a record.

        Raises:
            DataError: 'MissingField' or 'TemplateFailed', naming object, line and field.
            UserError: 'BadTemplate' where the template does what the sandbox forbids.
        """
        return Pair(self._prompt.render(record), self._completion.render(record))


class _Text:
    """One compiled text of a template."""

    def __init__(self, name: str, source: str) -> None:
        self._name = name
        try:
            self._needed = sorted(jinja2.meta.find_undeclared_variables(_ENVIRONMENT.parse(source)))
            self._compiled = _ENVIRONMENT.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                "BadTemplate",
                f"template.{name}, line {error.lineno}: {error.message}; got {source!r}",
            ) from None

    def render(self, record: Record) -> str:
        fields = record.fields
        try:
            return self._compiled.render(fields)
        except jinja2.UndefinedError as error:
            missing = [name for name in self._needed if name not in fields]
            if missing:
                why = f"is missing (template.{self._name} needs it)"
                raise missing_field(record, missing[0], why) from None
            raise DataError(
                "MissingField", f"{record.where}: template.{self._name}: {error.message}"
            ) from None
        except _NullField:
            null = [name for name in self._needed if name in fields and fields[name] is None]
            why = f"is null (template.{self._name} writes it)"
            raise missing_field(record, null[0] if null else "?", why) from None
        except SecurityError as error:
            raise UserError("BadTemplate", f"template.{self._name}: {error}") from None
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise DataError(
                "TemplateFailed",
                f"{record.where}: template.{self._name} fails on this record: {error}. Correct the"
                " record or the template",
            ) from None
