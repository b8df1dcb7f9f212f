"""Rows of the table of specs (``spec_table``).

A row changes the minimal spec at dotted paths. A bad row has the path that pydantic and the API
server must report, a fragment of both messages (the allowed values), and the value that both show.
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
"""Value of a change that removes the field."""


@dataclass(frozen=True)
class Row:
    """One spec; ``path`` is None if it is valid."""

    name: str
    change: dict[str, Any]
    path: str | None = None
    allowed: str = ""
    """Fragment of both messages; case is ignored."""
    got: str | None = None
    """Value as both messages show it; None if the API server shows none (a field that is absent,
    unknown, too long or of another type)."""
    stored: dict[str, Any] = field(default_factory=dict)
    """Values that pydantic normalizes, as the API server stores them."""

    @property
    def spec(self) -> dict[str, Any]:
        return changed(self.change)


def changed(change: dict[str, Any]) -> dict[str, Any]:
    """Return the minimal spec with values set at dotted paths."""
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
    """Return one training set per argument, with these fields."""
    return [{"source": "s3://data/a.jsonl", **fields} for fields in extra]


TEMPLATE = {"prompt": "{{ question }}", "completion": " {{ answer }}"}
SECRET = {"name": "s3-credentials"}
MEMORY = {"requests": {"cpu": "4", "memory": "16Gi"}, "limits": {"nvidia.com/mig-1g.5gb": "1"}}
