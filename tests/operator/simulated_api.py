"""API server in memory: objects with uids and versions, server-side apply as far as the operator
uses it, garbage collection by owner, and one ordered watch per kind.

``Connection`` has the methods of ``finetune_operator.cluster.Cluster`` and can fail as a network
does: before or after the server has carried out a request.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

from operator_world import T0

from finetune_api import names
from finetune_api.status import FineTuneJobStatus
from finetune_operator.cluster import ApiError
from finetune_operator.decision.plan import Subject
from finetune_operator.watch import RESOURCES
from finetune_operator.world.objects import format_time

Json = dict[str, Any]
NAMESPACE = "team"


class Crash(BaseException):
    """The operator process dies: nothing of it catches this."""


Fault = Literal["crash", "crash-after", "lost", "timeout", "500", "409", "429"]
FAULTS: tuple[Fault, ...] = ("crash", "crash-after", "lost", "timeout", "500", "409", "429")
"""``lost`` and ``crash-after``: the server carries out the request, and its answer gets lost."""


class SimulatedApi:
    """Objects by kind and name, in one namespace. Stored objects are never changed in place."""

    def __init__(self) -> None:
        self.now = T0
        self.objects: dict[tuple[str, str], Json] = {}
        self.log: dict[str, list[tuple[str, Json]]] = {kind: [] for kind in RESOURCES}
        self.version = 0
        self.writes = 0
        """Requests of operators that changed an object."""
        self.on_create: Callable[[Json], None] = lambda _: None
        self.on_status: Callable[[Json, Json], None] = lambda _old, _new: None

    # --- objects ---------------------------------------------------------------------------------

    def of(self, kind: str) -> list[Json]:
        return [obj for (k, _), obj in self.objects.items() if k == kind]

    def get(self, kind: str, name: str) -> Json | None:
        return self.objects.get((kind, name))

    def exists(self, uid: str) -> bool:
        return any(obj["metadata"]["uid"] == uid for obj in self.objects.values())

    def create(self, kind: str, obj: Json) -> Json:
        meta = obj["metadata"]
        made = {"uid": f"uid-{self.version}", "creationTimestamp": format_time(self.now)}
        return self._store("ADDED", kind, obj | {"kind": kind, "metadata": meta | made})

    def update(self, kind: str, name: str, **parts: Any) -> Json:
        """Merge ``parts`` into an object."""
        old = self.objects[kind, name]
        new = merged(old, parts)
        return old if new == old else self._store("MODIFIED", kind, new)

    def remove(self, kind: str, name: str) -> None:
        obj = self.objects.pop((kind, name))
        self.version += 1
        gone = obj | {"metadata": obj["metadata"] | {"resourceVersion": str(self.version)}}
        self.log[kind].append(("DELETED", gone))

    def _store(self, what: str, kind: str, obj: Json) -> Json:
        self.version += 1
        meta = obj["metadata"] | {"resourceVersion": str(self.version)}
        stored = obj | {"metadata": meta}
        self.objects[kind, meta["name"]] = stored
        self.log[kind].append((what, stored))
        return stored

    def collect_garbage(self) -> None:
        """Delete objects whose owner does not exist; pods end with their grace period."""
        uids = {obj["metadata"]["uid"] for obj in self.objects.values()}
        for (kind, name), obj in list(self.objects.items()):
            owners = obj["metadata"].get("ownerReferences") or []
            if owners and not any(owner["uid"] in uids for owner in owners):
                self.delete(kind, name)

    def delete(self, kind: str, name: str) -> None:
        """Delete an object as a user or a controller does; a pod with a node ends gracefully."""
        obj = self.objects[kind, name]
        if kind != "Pod" or not obj["spec"].get("nodeName"):
            self.remove(kind, name)
        elif "deletionTimestamp" not in obj["metadata"]:
            grace = timedelta(seconds=obj["spec"]["terminationGracePeriodSeconds"])
            self.update(kind, name, metadata={"deletionTimestamp": format_time(self.now + grace)})

    # --- requests of an operator -----------------------------------------------------------------

    def post(self, obj: Json) -> Json:
        kind, name = obj["kind"], obj["metadata"]["name"]
        if self.get(kind, name) is not None:
            raise ApiError("POST", name, 409, f"{kind} {name} already exists")
        made = self.create(kind, obj)
        self.writes += 1
        self.on_create(made)
        return made

    def apply_status(self, subject: Subject, status: Json) -> Json:
        old = self.get(names.KIND, subject.name)
        if old is None:
            raise ApiError("PATCH", subject.name, 404, "not found")
        if old["metadata"]["uid"] != subject.uid:
            raise ApiError("PATCH", subject.name, 409, "the uid in the precondition differs")
        FineTuneJobStatus.model_validate(status)
        assert len(json.dumps(status)) < 100_000
        before = old.get("status", {})
        if before == status:
            return old
        self.writes += 1
        self.on_status(before, status)
        return self._store("MODIFIED", names.KIND, old | {"status": status})

    def patch(self, kind: str, name: str, patch: Json) -> Json | None:
        old = self.get(kind, name)
        return None if old is None else self._counted(
            old, lambda: self.update(kind, name, **patch)
        )  # fmt: skip

    def delete_if_present(self, kind: str, name: str, uid: str) -> None:
        found = self.get(kind, name)
        if found is not None and found["metadata"]["uid"] == uid:
            self.writes += 1
            self.delete(kind, name)

    def _counted(self, old: Json, change: Callable[[], Json]) -> Json:
        new = change()
        self.writes += new is not old
        return new


class Connection:
    """The operator's client. ``faults`` has the fault of each of the next requests, None: none."""

    def __init__(self, api: SimulatedApi) -> None:
        self._api = api
        self.faults: list[Fault | None] = []
        self.while_waiting: Callable[[], None] = lambda: None
        """Called between a request and its answer."""

    async def create(self, obj: Json) -> Json:
        return self._request(lambda: self._api.post(obj))

    async def get(self, kind: str, _: str, name: str) -> Json | None:
        return self._request(lambda: self._api.get(kind, name))

    async def apply_status(self, subject: Subject, status: Json) -> Json:
        return self._request(lambda: self._api.apply_status(subject, status))

    async def patch(self, kind: str, _: str, name: str, patch: Json) -> Json | None:
        return self._request(lambda: self._api.patch(kind, name, patch))

    async def delete(self, kind: str, _: str, name: str, uid: str) -> None:
        self._request(lambda: self._api.delete_if_present(kind, name, uid))

    async def event(self, *_: object) -> None:
        self._request(lambda: None)

    async def versions(self, kind: str, _: str | None, selector: str) -> tuple[int, set[str]]:
        return self._api.version, {obj["metadata"]["uid"] for obj in self._api.of(kind)}

    def _request(self, carry_out: Callable[[], Any]) -> Any:
        fault = self.faults.pop(0) if self.faults else None
        if fault == "crash":
            raise Crash
        if fault == "timeout":
            raise TimeoutError
        if fault in ("500", "409", "429"):
            wait = 3.0 if fault == "429" else None
            raise ApiError("PATCH", "x", int(fault), "refused by the simulation", wait)
        answer = carry_out()
        self.while_waiting()
        if fault == "crash-after":
            raise Crash
        if fault == "lost":
            raise TimeoutError
        return answer


def merged(old: Any, new: Any) -> Any:
    """JSON merge patch: maps are merged, None removes, all else is replaced."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    result = {key: value for key, value in old.items() if new.get(key, value) is not None}
    for key, value in new.items():
        if value is not None:
            result[key] = merged(old.get(key), value)
    return result
