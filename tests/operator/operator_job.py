"""A FineTuneJob of an API test: what a user applies and sees, and the ends of its pods."""

from __future__ import annotations

import json
from typing import Any

from operator_world import PREPARED, spec

from cluster.api import Api, eventually
from cluster.kwok import EXIT_CODE, MESSAGE
from finetune_api import names
from finetune_api.results import Termination

WITHIN = 40.0


class Job:
    """One FineTuneJob of a test, in a namespace of its own."""

    def __init__(self, api: Api, namespace: str, within: float = WITHIN) -> None:
        """``within``: seconds in which what a test waits for must come."""
        self.api = api
        self.within = within
        self.namespace = namespace
        api.kubectl("create", "namespace", namespace)

    def apply(self, **more: Any) -> None:
        more["compute"] = {"gpusPerNode": 0, **more.get("compute", {})}
        self.api.apply(
            {
                "apiVersion": names.API_VERSION,
                "kind": names.KIND,
                "metadata": {"name": "bot", "namespace": self.namespace},
                "spec": spec(**more),
            }
        )

    def patch(self, **more: Any) -> None:
        text = json.dumps({"spec": more})
        self.api.kubectl("patch", "ftj", "bot", "-n", self.namespace, "--type=merge", "-p", text)

    @property
    def object(self) -> Any:
        return self.api.get("ftj", "bot", "-n", self.namespace)

    @property
    def status(self) -> Any:
        return self.object.get("status", {})

    def condition_of(self, type_: str) -> str | None:
        found = [c for c in self.status.get("conditions", []) if c["type"] == type_]
        return f"{found[0]['status']}/{found[0]['reason']}" if found else None

    def reach(self, phase: str) -> None:
        def look() -> bool:
            seen = self.status.get("phase")
            if seen != phase:
                raise RuntimeError(f"phase {seen}, {self.status.get('failure')}")
            return True

        eventually(f"phase {phase}", look, within=self.within)

    def all(self, kind: str) -> list[Any]:
        selector = f"{names.LABEL_MANAGED_BY}={names.MANAGED_BY}"
        found: list[Any] = self.api.get(kind, "-n", self.namespace, "-l", selector)["items"]
        return found

    def names(self, kind: str) -> list[str]:
        return sorted(o["metadata"]["name"].split("-", 3)[-1] for o in self.all(kind))

    def uids(self, kind: str) -> set[str]:
        return {o["metadata"]["uid"] for o in self.all(kind)}

    def running(self, role: str, count: int, within: float | None = None) -> list[Any]:
        def look() -> list[Any]:
            alive = [
                p
                for p in self.all("pods")
                if p["metadata"]["labels"][names.LABEL_ROLE] == role
                and p["status"].get("phase") == "Running"
                and "deletionTimestamp" not in p["metadata"]
            ]
            return alive if len(alive) == count else []

        return eventually(f"{count} {role} pods run", look, within=within or self.within)

    def end(
        self, role: str, code: int = 0, count: int = 1, ending: int | None = None, **said: Any
    ) -> None:
        """End the ``count`` pods of a stage (or ``ending`` of them) with a termination message."""
        self.end_pods(self.running(role, count)[:ending], role, code, **said)

    def end_pods(self, pods: list[Any], role: str, code: int, **said: Any) -> None:
        run = pods[0]["metadata"]["labels"][names.LABEL_RUN]
        message = Termination.model_validate({"run": run, "role": role, **said}).to_text()
        for pod in pods:
            name = pod["metadata"]["name"]
            note = [f"{MESSAGE}={message}", f"{EXIT_CODE}={code}"]
            self.api.kubectl("annotate", "pod", name, "-n", self.namespace, *note)


def walk_to_training(job: Job, **more: Any) -> None:
    job.apply(**more)
    job.end("prepare", prepared=PREPARED)
    job.running("train", 2)
    job.reach("Training")
