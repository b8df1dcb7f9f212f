"""Reading plain API objects: times, and whose child something is."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from finetune_api import names
from finetune_api.names import Role

Object = Mapping[str, Any]


def parse_time(text: str | None) -> datetime | None:
    """An RFC 3339 time of the API, or None."""
    try:
        return datetime.fromisoformat(text) if text else None
    except ValueError:
        return None


def format_time(time: datetime) -> str:
    """RFC 3339 in UTC, to the second, as Kubernetes writes times."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def place_of(obj: Object) -> tuple[Role, str, int] | None:
    """Role, run and revision of a child by its labels, or None where it is none of ours."""
    labels = obj["metadata"].get("labels") or {}
    role, run = labels.get(names.LABEL_ROLE), labels.get(names.LABEL_RUN)
    revision = labels.get(names.LABEL_REVISION, "")
    if role not in names.ROLES or not run or not revision.isdigit():
        return None
    return role, run, int(revision)
