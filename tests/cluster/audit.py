"""The requests of some users, from the API server's audit log."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_WRITES: Final = {"create", "update", "patch", "delete", "deletecollection"}


@dataclass(frozen=True)
class Request:
    """An answered request."""

    user: str
    agent: str
    verb: str
    group: str
    resource: str
    """With a subresource after a slash, such as ``finetunejobs/status``."""
    namespace: str
    code: int
    message: str
    """Of a refusal."""

    @property
    def needed(self) -> set[str]:
        """The verbs that it needed: server-side apply of a new object needs create, too."""
        return {self.verb, "create"} if (self.verb, self.code) == ("patch", 201) else {self.verb}


class Audit:
    """An audit log of some users.

    Args:
        folder: for the policy and the log; it must exist when the API server starts.
    """

    def __init__(self, folder: Path, users: list[str]) -> None:
        self._log = folder / "audit.log"
        self._policy = folder / "audit.json"
        policy = {
            "apiVersion": "audit.k8s.io/v1",
            "kind": "Policy",
            "omitStages": ["RequestReceived"],  # the others have the answer; of a watch, its begin
            "rules": [{"level": "Metadata", "users": users}, {"level": "None"}],
        }
        self._policy.write_text(json.dumps(policy))

    @property
    def flags(self) -> list[str]:
        """Flags of the API server."""
        return [f"--audit-policy-file={self._policy}", f"--audit-log-path={self._log}"]

    def writes(self, agent: str, namespace: str) -> Counter[str]:
        """Return the number of writes so far of clients with this user agent, by resource."""
        return Counter(
            request.resource
            for request in self.requests()
            if request.verb in _WRITES and (request.agent, request.namespace) == (agent, namespace)
        )

    def requests(self) -> Iterator[Request]:
        """Yield the requests so far; a watch when it begins, and again when it ends."""
        if not self._log.exists():
            return
        for line in self._log.read_text().splitlines():
            event = json.loads(line)
            if about := event.get("objectRef"):
                yield Request(
                    user=event["user"]["username"],
                    agent=event.get("userAgent", ""),
                    verb=event["verb"],
                    group=about.get("apiGroup", ""),
                    resource="/".join(filter(None, (about["resource"], about.get("subresource")))),
                    namespace=about.get("namespace", ""),
                    code=event["responseStatus"]["code"],
                    message=event["responseStatus"].get("message", ""),
                )
