"""The operator's rights: as rendered roles give them, and as docs/security.md lists them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

Rights = dict[tuple[str, str], set[str]]
"""Verbs by API group and resource."""

_PAGE = Path(__file__).resolve().parents[2] / "docs/security.md"
_HEADER = "| group | resource | verbs | reason |"


def rights(role: dict[str, Any]) -> Rights:
    """The rights of a Role or ClusterRole."""
    found: Rights = {}
    for rule in role["rules"]:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                found.setdefault((group, resource), set()).update(rule["verbs"])
    return found


def documented_rights() -> tuple[Rights, Rights]:
    """The tables in docs/security.md: rights in watched namespaces, and in the release's."""
    watched, own = _PAGE.read_text().split(_HEADER)[1:]
    return _table(watched), _table(own)


def _table(text: str) -> Rights:
    found: Rights = {}
    for line in text.strip().splitlines()[1:]:
        if not line.startswith("|"):
            break
        group, resource, verbs, reason = (cell.strip() for cell in line.strip("|").split("|"))
        assert reason, f"{resource}: a right needs a reason"
        found["" if group == "core" else group, resource] = set(re.split(r",\s*", verbs))
    return found
