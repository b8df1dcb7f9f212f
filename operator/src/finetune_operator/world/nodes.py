"""Conditions of nodes that agents for node health set, such as node-problem-detector, NVSentinel.

By their convention a condition is True while there is a problem.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any


def node_problems(node: Mapping[str, Any], types: Sequence[str]) -> str:
    """Return the problems of a node in the agents' words; "" if it has none.

    Args:
        node: the Node object.
        types: patterns of the condition types that count, such as ``Gpu*``.
    """
    conditions = (node.get("status") or {}).get("conditions") or []
    return "; ".join(
        f"{c.get('type')} ({c.get('reason')}): {c.get('message') or 'no message'}"
        for c in conditions
        if c.get("status") == "True"
        and any(fnmatchcase(str(c.get("type")), pattern) for pattern in types)
    )
