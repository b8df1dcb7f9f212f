"""The FineTuneJobs and their children in memory, as last seen: by a watch, or in the API server's
response to a write of this process.

A pass therefore sees the writes of the pass before it although the watch lags behind. An older
resourceVersion never replaces a newer one.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Final

from finetune_api import names
from finetune_api.results import Progress
from finetune_operator.world.models import model_view
from finetune_operator.world.objects import Object
from finetune_operator.world.observe import Observed, Refusal, observe
from finetune_operator.world.pods import container_status, pull_is_failing
from finetune_operator.world.references import References

CHILD_KINDS: Final = ("ConfigMap", "Service", "Job", "Pod")
REMEMBERED_REMOVALS: Final = 10_000


def version_of(obj: Object) -> int:
    """resourceVersion as a number, comparable within one kind (KEP-5504); 0 if it is not a
    number."""
    text = str(obj["metadata"].get("resourceVersion", ""))
    return int(text) if text.isdigit() else 0


class Store:
    """FineTuneJobs by uid, and their children by the uid of their job."""

    def __init__(self) -> None:
        self._jobs: dict[str, Object] = {}
        self._references = References()
        self._children: dict[str, dict[str, dict[str, Object]]] = {}
        self._removed: dict[str, int] = {}
        self._gone_pods: dict[str, dict[str, Object]] = {}
        self._pull_failing: dict[str, datetime] = {}
        self._progress: dict[str, tuple[Progress, datetime]] = {}
        self._refused: dict[str, dict[str, Refusal]] = {}

    # --- changes --------------------------------------------------------------------------------

    def put(self, kind: str, obj: Object) -> str | None:
        """Add an object, or replace an older version of it. Returns the uid of its FineTuneJob;
        None for an object without one."""
        uid = obj["metadata"]["uid"]
        if kind == names.KIND:
            self._put_in(self._jobs, uid, obj, uid)
            self._references.put(self._jobs[uid])
            return str(uid)
        owner: str | None = (obj["metadata"].get("labels") or {}).get(names.LABEL_JOB_UID)
        if owner is None:
            return None
        if self._removed.get(uid, -1) >= version_of(obj):
            return owner
        if kind == "Pod":
            self._note_pull(uid, obj)
        kinds = self._children.setdefault(owner, {k: {} for k in CHILD_KINDS})
        return self._put_in(kinds[kind], uid, obj, owner)

    @staticmethod
    def _put_in(place: dict[str, Object], uid: str, obj: Object, owner: str) -> str:
        known = place.get(uid)
        if known is None or version_of(known) <= version_of(obj):
            place[uid] = obj
        return owner

    def remove(self, kind: str, obj: Object) -> str | None:
        """Remove an object that was deleted. Returns the uid of its FineTuneJob, or None."""
        uid = obj["metadata"]["uid"]
        if kind == names.KIND:
            self._references.remove(obj)
            self._remove_job(uid)
            return str(uid)
        owner: str | None = (obj["metadata"].get("labels") or {}).get(names.LABEL_JOB_UID)
        if owner is None:
            return None
        # The response to a write of this process may arrive after the deletion event.
        self._removed[uid] = version_of(obj)
        while len(self._removed) > REMEMBERED_REMOVALS:
            self._removed.pop(next(iter(self._removed)))
        kinds = self._children.get(owner, {})
        kinds.get(kind, {}).pop(uid, None)
        if kind == "Pod":
            self._pull_failing.pop(uid, None)
            if owner in self._jobs and container_status(obj).get("state"):
                self._gone_pods.setdefault(owner, {})[uid] = _ended(obj)
        if owner not in self._jobs and not any(kinds.values()):
            self._children.pop(owner, None)
        return owner

    def _remove_job(self, uid: str) -> None:
        for place in (self._jobs, self._gone_pods, self._progress, self._refused):
            place.pop(uid, None)

    def _note_pull(self, uid: str, pod: Object) -> None:
        if pull_is_failing(pod):
            self._pull_failing.setdefault(uid, datetime.now(UTC))
        elif container_status(pod).get("state", {}).get("running"):
            self._pull_failing.pop(uid, None)

    def put_progress(self, uid: str, progress: Progress, time: datetime) -> None:
        """Keep the newest progress of a job's gang."""
        if uid in self._jobs:
            self._progress[uid] = (progress, time)

    def put_refusal(self, uid: str, name: str, refusal: Refusal | None) -> None:
        """Record that the API server refused a child; None: that it accepted the child."""
        if refusal is not None:
            self._refused.setdefault(uid, {})[name] = refusal
        else:
            self._refused.get(uid, {}).pop(name, None)

    # --- reads --------------------------------------------------------------------------------

    def job(self, uid: str) -> Object | None:
        """The FineTuneJob with that uid."""
        return self._jobs.get(uid)

    def jobs(self) -> Iterator[Object]:
        """All FineTuneJobs."""
        return iter(list(self._jobs.values()))

    def affected(self, kind: str, obj: Object) -> list[str]:
        """Uids of other jobs that a change of an object may affect: jobs that start from the model
        of a FineTuneJob."""
        return self._references.dependents(obj) if kind == names.KIND else []

    def refusal(self, uid: str, name: str) -> Refusal | None:
        """The API server's refusal of a job's child."""
        return self._refused.get(uid, {}).get(name)

    def children(self, uid: str, kind: str) -> list[Object]:
        """A job's children of one kind."""
        return list(self._children.get(uid, {}).get(kind, {}).values())

    def objects(self, kind: str) -> list[Object]:
        """All objects of one kind."""
        if kind == names.KIND:
            return list(self._jobs.values())
        return [o for kinds in self._children.values() for o in kinds[kind].values()]

    def observed(self, uid: str) -> Observed:
        """Everything that ``decide`` sees of a job's children, and of the jobs that it refers
        to."""
        progress, time = self._progress.get(uid, (None, None))
        job = self._jobs.get(uid)
        named = self._references.chain(job) if job is not None else []
        return observe(
            config_maps=self.children(uid, "ConfigMap"),
            jobs=self.children(uid, "Job"),
            services=self.children(uid, "Service"),
            pods=self.children(uid, "Pod"),
            gone=self._gone_pods.get(uid, {}).values(),
            pull_failing_since=self._pull_failing,
            progress=progress,
            progress_time=time,
            refused=self._refused.get(uid),
            models=[model_view(o, self.children(o["metadata"]["uid"], "ConfigMap")) for o in named],
        )


def _ended(pod: Object) -> dict[str, Any]:
    """A deleted pod as an ended one: a container that was last seen running ends now."""
    copy: dict[str, Any] = {**pod, "status": {**(pod.get("status") or {})}}
    statuses = []
    for status in copy["status"].get("containerStatuses") or []:
        running = (status.get("state") or {}).get("running")
        if running:
            end = {"startedAt": running.get("startedAt"), "finishedAt": _now_text()}
            status = {**status, "state": {"terminated": {**end, "exitCode": 137}}}
        statuses.append(status)
    copy["status"]["containerStatuses"] = statuses
    return copy


def _now_text() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
