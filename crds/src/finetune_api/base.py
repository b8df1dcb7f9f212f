"""How every model of the contract behaves: strict, frozen, camelCase, with rules in two languages.

A cross-field rule is written once, as a ``Rule`` that holds its CEL expression (for the API server)
beside its Python predicate (for files): tests run both over one table of specs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic import model_validator
from pydantic.alias_generators import to_camel


@dataclass(frozen=True)
class Rule:
    """One cross-field rule of a model, for the API server and for Python.

    ``message`` names what is allowed; ``holds`` gets the validated model.
    """

    cel: str
    message: str
    holds: Callable[[Any], bool]


class Model(BaseModel):
    """Base of every contract model: unknown fields refused, no coercion, immutable."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, alias_generator=to_camel, use_attribute_docstrings=True
    )
    RULES: ClassVar[tuple[Rule, ...]] = ()

    @model_validator(mode="after")
    def _check_rules(self) -> Any:
        for rule in self.RULES:
            if not rule.holds(self):
                raise ValueError(rule.message)
        return self

    def to_json(self) -> dict[str, Any]:
        """The model as it stands in a manifest: camelCase keys, unset fields left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


# Numbers with a fraction are strings (Kubernetes API conventions forbid floats); the patterns are
# read alike by RE2 (API server) and by Rust's regex (pydantic).
DecimalString = Annotated[
    str,
    StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]{1,2})?$", max_length=32),
]
"""A number of zero or more, written as a string: "0.1", "2e-4"."""

Fraction = Annotated[
    str, StringConstraints(pattern=r"^(0(\.[0-9]+)?|1(\.0+)?)$", max_length=32)
]
"""A number from 0 to 1, written as a string: "0.05"."""

S3Uri = Annotated[
    str,
    StringConstraints(pattern=r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^?#\s]*)?$", max_length=1024),
]
"""An address in object storage: s3://bucket/prefix."""

DnsLabel = Annotated[
    str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", min_length=1, max_length=63)
]
"""A DNS label: lower-case letters, digits and '-', at most 63 characters."""

DnsName = Annotated[
    str,
    StringConstraints(
        pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$",
        min_length=1,
        max_length=253,
    ),
]
"""The name of a Kubernetes object: a DNS subdomain of at most 253 characters."""

Text = Annotated[str, StringConstraints(min_length=1, max_length=16384)]
"""Free text, at most 16,384 characters."""

FieldName = Annotated[str, StringConstraints(min_length=1, max_length=128)]
"""The name of a field of a data record."""

Count = Annotated[int, Field(ge=1, le=2_147_483_647)]
"""A whole number of at least 1."""


class InvalidSpec(ValueError):
    """A manifest that breaks the contract; ``problems`` has one line per fault, path first."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def explain(error: ValidationError, root: str = "spec") -> list[str]:
    """One line per fault of a pydantic error: the field's path, what is allowed, the value."""
    lines = []
    for item in error.errors(include_url=False):
        path = root
        for part in item["loc"]:
            path += f"[{part}]" if isinstance(part, int) else f".{part}"
        value = repr(item.get("input"))
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "missing":
            lines.append(f"{path}: required, but absent")
        elif item["type"] == "extra_forbidden":
            lines.append(f"{path}: unknown field; see docs/reference.md for the fields there are")
        else:
            shown = value if len(value) <= 80 else value[:77] + "..."
            lines.append(f"{path}: {message}; got {shown}")
    return lines
