"""Base classes of the API models: strict, frozen, camelCase, with rules in CEL and Python.

A ``Rule`` is a cross-field rule with a CEL expression (for the API server) and a Python predicate
(for files). A ``Spelling`` is the format of a string, with a description of the allowed values.
Tests check both sides against one table of specs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Final, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic.fields import FieldInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, core_schema, from_json


@dataclass(frozen=True)
class Rule:
    """A cross-field rule of a model, for the API server and for Python.

    ``message`` says what is allowed; ``holds`` gets the validated model; ``got`` names the fields
    whose values are shown (``list[].field`` for the items of a list). These fields must be present
    whenever the rule is violated; ``got`` is empty if the violation is that fields are absent.
    """

    cel: str
    message: str
    holds: Callable[[Any], bool]
    got: tuple[str, ...]

    def cel_message(self) -> str:
        """Return CEL that formats the message and the values, which the API server does not
        show."""
        # format() is the only conversion to text whose cost the API server can estimate.
        text = self.message.replace("%", "%%").replace("'", "\\'")
        if not self.got:
            return f"'{text}'.format([])"
        shown = ", ".join(f"{path} %s" for path in self.got)
        return f"'{text}; got {shown}'.format([{', '.join(map(_cel_value, self.got))}])"

    def text(self, model: Model) -> str:
        """Return the message with the values of a model that violates the rule."""
        if not self.got:
            return self.message
        raw = model.to_json()
        shown = ", ".join(f"{path} {_json_value(raw, path)}" for path in self.got)
        return f"{self.message}; got {shown}"


def _cel_value(path: str) -> str:
    items, _, field = path.rpartition("[].")
    if items:
        return f"self.{items}.map(item, has(item.{field}) ? item.{field} : '(none)')"
    return f"self.{path}"


def _json_value(raw: Any, path: str) -> str:
    items, _, field = path.rpartition("[].")
    for part in (items or path).split("."):
        raw = raw[part]
    if items:
        return json.dumps([item.get(field, "(none)") for item in raw])
    return raw if isinstance(raw, str) else json.dumps(raw)


@dataclass(frozen=True)
class Spelling:
    """The format of a string: a pattern, and a description of the allowed values.

    RE2 (API server) and Rust's regex (pydantic) read the pattern identically if it has only ASCII
    classes: no ``\\s``, ``\\w``, ``\\d``. Messages are "must be" and ``allowed``.
    """

    pattern: str
    allowed: str
    max_length: int
    or_integer: bool = False
    """Whether the API server also accepts integers (as for Kubernetes quantities)."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        text = core_schema.str_schema(pattern=self.pattern, strict=True)
        form = core_schema.custom_error_schema(
            text, "spelling", custom_error_message=f"must be {self.allowed}"
        )
        bounded = core_schema.chain_schema(
            [core_schema.str_schema(max_length=self.max_length), form]
        )
        if not self.or_integer:
            return bounded
        return core_schema.no_info_before_validator_function(_number_as_text, bounded)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        cel = f"self.matches(r'{self.pattern}')"
        result: JsonSchemaValue = {"type": "string", "maxLength": self.max_length}
        if self.or_integer:
            result["x-kubernetes-int-or-string"] = True
            cel = f"type(self) == string ? {cel} : self >= 0"
        rule = {"rule": cel, "message": f"must be {self.allowed}"}
        return {**result, "x-kubernetes-validations": [rule]}


def _number_as_text(value: Any) -> Any:
    """Convert an integer, which the API server accepts, to a string."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return str(value) if whole else value


class Model(BaseModel):
    """Base of every API model: unknown fields are refused, no coercion, immutable."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        alias_generator=to_camel,
        use_attribute_docstrings=True,
    )
    RULES: ClassVar[tuple[Rule, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _as_on_the_api_server(cls, raw: Any) -> Any:
        """Treat null as absent and 3.0 as 3, as the API server does."""
        if not isinstance(raw, dict):
            return raw
        return {
            key: int(value) if isinstance(value, float) and value.is_integer() else value
            for key, value in raw.items()
            if value is not None
        }

    @model_validator(mode="after")
    def _check_rules(self) -> Any:
        for rule in self.RULES:
            if not rule.holds(self):
                raise PydanticCustomError("rule", "{text}", {"text": rule.text(self)})
        return self

    def to_json(self) -> dict[str, Any]:
        """Return the model as in a manifest: camelCase keys, without unset fields."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


M = TypeVar("M", bound=Model)


_ROUNDS: Final = 8
"""Rounds of ``read_known``: each leaves out all that is refused then, which may leave the values
around it incomplete."""


def read_known(model: type[M], raw: Any) -> M:
    """Read a document that another release, or a user's image, may have written: fields and values
    that this release does not know, or refuses, are left out.

    Args:
        raw: the document, or its JSON text.

    Raises:
        ValueError: it is no JSON, or what remains is not a document of this model.
    """
    # Limits the depth, and makes a copy.
    remaining = from_json(raw if isinstance(raw, str | bytes) else json.dumps(raw))
    for _ in range(_ROUNDS):
        try:
            return model.model_validate(remaining)
        except ValidationError as error:
            found = error.errors(include_url=False, include_input=False)
            if not _leave_out(remaining, [each["loc"] for each in found]):
                raise
    return model.model_validate(remaining)


Place = tuple[str | int, ...]
"""Names and positions that lead to a value in a document."""


def _leave_out(document: Any, places: Iterable[Place]) -> bool:
    """Remove the values at some places or, where there is none (a required field is missing), the
    values around them. Return whether something was removed."""
    found = {_nearest(document, place) for place in places} - {()}
    outermost = [p for p in found if not any(p[:end] in found for end in range(1, len(p)))]
    # From the last item of a list to the first, so that positions stay valid.
    for *parents, last in sorted(outermost, key=_order, reverse=True):
        around = document
        for key in parents:
            around = around[key]
        del around[last]
    return bool(outermost)


def _nearest(document: Any, place: Place) -> Place:
    """The longest part of a place at which the document has a value."""
    value = document
    for end, key in enumerate(place):
        in_list = isinstance(value, list) and isinstance(key, int) and key < len(value)
        if not in_list and not (isinstance(value, dict) and key in value):
            return place[:end]
        value = value[key]
    return place


def _order(place: Place) -> list[tuple[bool, int, str]]:
    return [(isinstance(p, int), p if isinstance(p, int) else 0, str(p)) for p in place]


def with_unknown(model: type[Model], stored: Any, new: dict[str, Any]) -> dict[str, Any]:
    """Return ``new`` with the fields of a stored document that this release does not know, so that
    writing it back loses nothing. Items of lists are not looked into."""
    if not isinstance(stored, dict):
        return new
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    found = new | {key: value for key, value in stored.items() if key not in fields}
    for key, field in fields.items():
        inner = next(
            (t for t in (field.annotation, *get_args(field.annotation)) if _is_model(t)), None
        )
        if inner is not None and isinstance(new.get(key), dict):
            found[key] = with_unknown(inner, stored.get(key), new[key])
    return found


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Model)


class Record(Model):
    """A model written by programs, not users: it also accepts its Python field names."""

    model_config = ConfigDict(validate_by_name=True)


Word = Annotated[str, StringConstraints(max_length=256)]
"""A name or a CamelCase word in status."""

Uri = Annotated[str, StringConstraints(max_length=2048)]
"""An address in status."""

# Numbers with a fraction are strings (Kubernetes API conventions forbid floats).
DecimalString = Annotated[
    str,
    Spelling(
        r"^[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]{1,2})?$",
        'a number of zero or more, written as a string: "0.1", "2e-4"',
        max_length=32,
    ),
]
"""A number of zero or more, written as a string: "0.1", "2e-4"."""

Fraction = Annotated[
    str,
    Spelling(
        r"^(0(\.[0-9]+)?|1(\.0+)?)$",
        'a number from 0 to 1, written as a string: "0.05"',
        max_length=32,
    ),
]
"""A number from 0 to 1, written as a string: "0.05"."""


def is_zero(path: str) -> str:
    """Return CEL for: the DecimalString or Fraction at ``path`` is 0 (it has no other digit before
    an exponent)."""
    return f"{path}.matches('^[0.]+([eE].*)?$')"


def is_one(path: str) -> str:
    """Return CEL for: the Fraction at ``path`` is 1."""
    return f"{path}.startsWith('1')"


S3Uri = Annotated[
    str,
    Spelling(
        r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^?#\x00-\x20]*)?$",
        "an address in object storage: s3://bucket/prefix",
        max_length=1024,
    ),
]
"""An address in object storage: s3://bucket/prefix."""

DnsLabel = Annotated[
    str,
    Spelling(
        r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$",
        "lower-case letters, digits and '-', beginning and ending with a letter or digit",
        max_length=63,
    ),
]
"""A DNS label: lower-case letters, digits and '-', at most 63 characters."""

DnsName = Annotated[
    str,
    Spelling(
        r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$",
        "the name of a Kubernetes object: lower-case letters, digits, '-' and '.'",
        max_length=253,
    ),
]
"""The name of a Kubernetes object: a DNS subdomain of at most 253 characters."""

CamelWord = Annotated[
    str,
    Spelling(r"^[A-Z][A-Za-z0-9]*$", "a CamelCase word: NoProgress", max_length=64),
]
"""A CamelCase word."""

Text = Annotated[str, StringConstraints(min_length=1, max_length=16384)]
"""Free text, at most 16,384 characters."""

FieldName = Annotated[str, StringConstraints(min_length=1, max_length=128)]
"""The name of a field of a data record."""

Count = Annotated[int, Field(ge=1, le=2_147_483_647)]
"""A whole number of at least 1."""

NonNegativeCount = Annotated[int, Field(ge=0, le=2**53)]
"""A whole number in a report, bounded to what status can hold."""


class InvalidSpec(ValueError):
    """An invalid manifest; ``problems`` has one line per problem, path first."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


_CLOSE: Final = 0.7
"""Minimum similarity (difflib's ratio, at most 1) of a suggested name."""

API_TYPES = {
    "int_type": "integer",
    "int_from_float": "integer",
    "bool_type": "boolean",
    "string_type": "string",
    "list_type": "array",
    "dict_type": "object",
    "model_type": "object",
}
"""Pydantic's type errors as type names of the API server."""


def explain(error: ValidationError, model: type[Model], root: str = "spec") -> list[str]:
    """Return one line per problem of a pydantic error of ``model``: the field's path, the allowed
    values, the value, and for an unknown name the closest known one."""
    return [_explain(item, model, root) for item in error.errors(include_url=False)]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean x?"`` for the closest known word, or "" if none is close. Case,
    dashes and underscores are ignored."""
    plain = {_plain(name): name for name in known}
    close = get_close_matches(_plain(word), plain, n=1, cutoff=_CLOSE)
    return f"; did you mean {plain[close[0]]}?" if close else ""


def _plain(word: str) -> str:
    return word.replace("_", "").replace("-", "").lower()


def _explain(item: ErrorDetails, model: type[Model], root: str) -> str:
    path, message = root, item["msg"].removeprefix("Value error, ")
    location = item["loc"]
    if location[-1:] == ("[key]",):
        location, message = location[:-2], f"key: {message}"
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    value = repr(item["input"])
    if item["type"] == "missing":
        return f"{path}: required, but absent"
    if item["type"] == "extra_forbidden":
        meant = did_you_mean(str(location[-1]), _fields_at(model, location[:-1]))
        return f"{path}: unknown field{meant or '; see docs/reference.md for the fields there are'}"
    if item["type"] == "rule":
        return f"{path}: {message}"
    if item["type"] in API_TYPES:
        message = f"must be of type {API_TYPES[item['type']]}"
    if item["type"] == "string_type" and isinstance(item["input"], int | float):
        message += f' (write it in quotes: "{value}")'
    meant = ""
    if item["type"] == "literal_error" and isinstance(item["input"], str):
        meant = did_you_mean(item["input"], re.findall(r"'([^']*)'", item["ctx"]["expected"]))
    return f"{path}: {message}; got {value if len(value) <= 80 else value[:77] + '...'}{meant}"


def _fields_at(model: type[Model], location: Sequence[int | str]) -> list[str]:
    """Return the manifest's field names of the block at a location in a model."""
    annotation: Any = model
    for part in location:
        block = _block_in(annotation)
        if block is not None and isinstance(part, str):
            fields = {_spelled(name, info): info for name, info in block.model_fields.items()}
            annotation = fields[part].annotation if part in fields else None
    block = _block_in(annotation)
    return [_spelled(*field) for field in block.model_fields.items()] if block else []


def _spelled(name: str, info: FieldInfo) -> str:
    return info.alias or name


def _block_in(annotation: Any) -> type[Model] | None:
    """Return the model in an annotation: the type itself, an optional, or the items of a list or
    mapping."""
    if isinstance(annotation, type) and issubclass(annotation, Model):
        return annotation
    return next(filter(None, map(_block_in, get_args(annotation))), None)
