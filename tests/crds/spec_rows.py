"""Rows of the table of specs (``spec_table``): what a row is, and how it is written.

A row changes a minimal good spec at dotted paths. A bad row names the path that both must complain
of, a fragment that both messages have (what is allowed), and the value that both show.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

MINIMAL: dict[str, Any] = {
    "model": {"source": "s3://models/base"},
    "data": {"train": [{"source": "s3://data/train/*.jsonl"}]},
    "output": {"destination": "s3://models/tuned"},
}

ABSENT = object()
"""As a value of a change: the field is taken out."""


@dataclass(frozen=True)
class Row:
    """One spec; ``path`` is None where it is good."""

    name: str
    change: dict[str, Any]
    path: str | None = None
    allowed: str = ""
    """Fragment of both messages, in any case."""
    got: str | None = None
    """Value as both messages show it; None where the API server shows none (a field that is
    absent, unknown, too long or of another type)."""
    stored: dict[str, Any] = field(default_factory=dict)
    """What pydantic normalises, as the API server keeps it."""

    @property
    def spec(self) -> dict[str, Any]:
        return changed(self.change)


def changed(change: dict[str, Any]) -> dict[str, Any]:
    """The minimal spec with values set at dotted paths."""
    spec = copy.deepcopy(MINIMAL)
    for path, value in change.items():
        *parents, last = path.split(".")
        block = spec
        for parent in parents:
            block = block.setdefault(parent, {})
        if value is ABSENT:
            del block[last]
        else:
            block[last] = value
    return spec


def good(name: str, change: dict[str, Any], stored: dict[str, Any] | None = None) -> Row:
    return Row(name, change, stored=stored or {})


def bad(name: str, change: dict[str, Any], path: str, allowed: str, got: str | None) -> Row:
    return Row(name, change, f"spec.{path}".rstrip("."), allowed, got)


def sources(*extra: dict[str, Any]) -> list[dict[str, Any]]:
    """Training sets that differ in what matters to a row."""
    return [{"source": "s3://data/a.jsonl", **fields} for fields in extra]


TEMPLATE = {"prompt": "{{ question }}", "completion": " {{ answer }}"}
SECRET = {"name": "s3-credentials"}
MEMORY = {"requests": {"cpu": "4", "memory": "16Gi"}, "limits": {"nvidia.com/mig-1g.5gb": "1"}}
