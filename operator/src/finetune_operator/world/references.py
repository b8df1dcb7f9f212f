"""Index of which FineTuneJob starts from which other's model (``spec.model.fineTuneJobRef``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_operator.world.objects import Object

Key = tuple[str, str]
"""Namespace and name of a FineTuneJob."""


def reference_of(job: Object) -> str | None:
    """Name of the job that a FineTuneJob (as stored) starts from; None if it names none."""
    found: Any = job
    for key in ("spec", "model", "fineTuneJobRef", "name"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, str) else None


class References:
    """An index of all FineTuneJobs, by name and by the job that each refers to."""

    def __init__(self) -> None:
        self._jobs: dict[Key, Object] = {}
        self._dependents: dict[Key, set[str]] = {}
        """Uids of the jobs that refer to a name; a job with that name need not exist."""
        self._referred: dict[str, Key] = {}
        """The name that a job refers to, by the job's uid."""

    def put(self, job: Object) -> None:
        """Add a job, or replace an older version of it."""
        meta = job["metadata"]
        self._jobs[meta["namespace"], meta["name"]] = job
        self._remove_reference(meta["uid"])
        name = reference_of(job)
        if name is not None:
            referred = self._referred[meta["uid"]] = (meta["namespace"], name)
            self._dependents.setdefault(referred, set()).add(meta["uid"])

    def remove(self, job: Object) -> None:
        """Remove a job; a newer job with the same name stays."""
        meta = job["metadata"]
        known = self._jobs.get((meta["namespace"], meta["name"]))
        if known is not None and known["metadata"]["uid"] == meta["uid"]:
            del self._jobs[meta["namespace"], meta["name"]]
        self._remove_reference(meta["uid"])

    def _remove_reference(self, uid: str) -> None:
        referred = self._referred.pop(uid, None)
        if referred is not None:
            self._dependents[referred].discard(uid)
            if not self._dependents[referred]:
                del self._dependents[referred]

    def dependents(self, job: Object) -> list[str]:
        """Uids of the jobs that refer to this one."""
        meta = job["metadata"]
        return sorted(self._dependents.get((meta["namespace"], meta["name"]), ()))

    def chain(self, job: Object) -> list[Object]:
        """The job that a job refers to, the job that that job refers to, and so on: each once, and
        never the first job itself."""
        namespace = job["metadata"]["namespace"]
        seen, found = {job["metadata"]["name"]}, []
        name = reference_of(job)
        while name is not None and name not in seen:
            following = self._jobs.get((namespace, name))
            if following is None:
                break
            found.append(following)
            seen.add(name)
            name = reference_of(following)
        return found
