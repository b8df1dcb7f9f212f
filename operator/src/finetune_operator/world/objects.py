"""Plain API objects: times, and the labels of children."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

from finetune_api import names
from finetune_api.names import Role

Object = Mapping[str, Any]


class ChildLabels(NamedTuple):
    """The stage, run and revision in the labels of a child."""

    role: Role
    run: str
    revision: int


def child_labels(obj: Object) -> ChildLabels | None:
    """Labels of a stage's child; None for an object that the operator did not make for a stage."""
    labels = obj["metadata"].get("labels") or {}
    role, run = labels.get(names.LABEL_ROLE), labels.get(names.LABEL_RUN)
    revision = labels.get(names.LABEL_REVISION, "")
    if role not in names.ROLES or not run or not revision.isdigit():
        return None
    return ChildLabels(role, run, int(revision))


def parse_time(text: str | None) -> datetime | None:
    """An RFC 3339 time of the API, or None."""
    try:
        return datetime.fromisoformat(text) if text else None
    except ValueError:
        return None


def format_time(time: datetime) -> str:
    """RFC 3339 in UTC, to the second, as Kubernetes writes times."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
