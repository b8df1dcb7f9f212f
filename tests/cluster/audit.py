"""Counts of the writes that a client has sent, from the API server's audit log."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_WRITES = ["create", "update", "patch", "delete"]


class Audit:
    """An audit log of the writes of some users.

    Args:
        folder: for the policy and the log; it must exist when the API server starts.
    """

    def __init__(self, folder: Path, users: list[str]) -> None:
        self._log = folder / "audit.log"
        self._policy = folder / "audit.json"
        policy = {
            "apiVersion": "audit.k8s.io/v1",
            "kind": "Policy",
            "omitStages": ["RequestReceived"],
            "rules": [
                {"level": "Metadata", "users": users, "verbs": _WRITES},
                {"level": "None"},
            ],
        }
        self._policy.write_text(json.dumps(policy))

    @property
    def flags(self) -> list[str]:
        """Flags of the API server."""
        return [f"--audit-policy-file={self._policy}", f"--audit-log-path={self._log}"]

    def writes(self, agent: str, namespace: str) -> Counter[str]:
        """Number of writes so far of clients with this user agent, by resource (``jobs``,
        ``finetunejobs/status``, …)."""
        return Counter(
            "/".join(filter(None, (about["resource"], about.get("subresource"))))
            for about in self._requests(agent)
            if about.get("namespace") == namespace
        )

    def _requests(self, agent: str) -> Iterator[dict[str, Any]]:
        if not self._log.exists():
            return
        for line in self._log.read_text().splitlines():
            event = json.loads(line)
            if event.get("userAgent") == agent:
                yield event["objectRef"]
