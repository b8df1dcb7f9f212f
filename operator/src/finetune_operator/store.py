"""The FineTuneJobs and their children in memory, as last seen: by a watch, or in the API server's
response to a write of this process.

A pass therefore sees the writes of the pass before it although the watch lags behind. An older
resourceVersion never replaces a newer one, and a removed object does not come back by a late
response.

Labels are not trusted: a child belongs to a job only in the job's namespace, and only if the job is
its controller (for a pod: if a Job is). Otherwise an object in any namespace could pose as the run
spec or the progress of another team's job.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from finetune_api import names
from finetune_api.results import Progress
from finetune_operator.world.models import model_mark, model_view
from finetune_operator.world.objects import Object
from finetune_operator.world.observe import Observed, Refusal, observe
from finetune_operator.world.pods import container_status, pull_is_failing
from finetune_operator.world.references import References

CHILD_KINDS: Final = ("ConfigMap", "Service", "Job", "Pod")
REMEMBERED_REMOVALS: Final = 10_000
_LAST_APPLIED: Final = "kubectl.kubernetes.io/last-applied-configuration"


def version_of(obj: Object) -> int:
    """resourceVersion as a number, comparable within one kind (KEP-5504); 0 if it is not a
    number."""
    text = str(obj["metadata"].get("resourceVersion", ""))
    return int(text) if text.isdigit() else 0


class Owner(NamedTuple):
    """A FineTuneJob as the owner of children."""

    namespace: str
    uid: str


def _as_owner(job: Object) -> Owner:
    return Owner(job["metadata"]["namespace"], job["metadata"]["uid"])


def owner_of(kind: str, obj: Object) -> Owner | None:
    """The FineTuneJob that an object belongs to (itself, if it is one); None for an object that
    claims a job by its label, without being controlled by the job."""
    if kind == names.KIND:
        return _as_owner(obj)
    meta = obj["metadata"]
    uid = (meta.get("labels") or {}).get(names.LABEL_JOB_UID)
    owners = meta.get("ownerReferences") or []
    controller = next((o for o in owners if o.get("controller")), None)
    if uid is None or controller is None:
        return None
    if kind == "Pod":
        is_child = (controller.get("apiVersion"), controller.get("kind")) == ("batch/v1", "Job")
    else:
        group = str(controller.get("apiVersion")).partition("/")[0]
        is_child = (group, controller.get("kind"), controller.get("uid")) == (
            names.GROUP, names.KIND, uid,
        )  # fmt: skip
    return Owner(meta["namespace"], uid) if is_child else None


def manager_of(job: Object) -> str:
    """Name of the operator that a FineTuneJob names; empty: the one without a name."""
    spec = job.get("spec")
    found = spec.get("managedBy") if isinstance(spec, Mapping) else None
    return found if isinstance(found, str) else ""


class Store:
    """FineTuneJobs by uid, and their children by owner."""

    def __init__(self, managed_by: str = "") -> None:
        """
        Args:
            managed_by: name of this operator; jobs with another ``spec.managedBy`` are kept only
                as sources of models.
        """
        self._managed_by = managed_by
        self._jobs: dict[str, Object] = {}
        self._references = References()
        self._children: dict[Owner, dict[str, dict[str, Object]]] = {}
        self._removed: dict[str, int] = {}
        self._gone_pods: dict[Owner, dict[str, Object]] = {}
        self._pull_failing: dict[str, datetime] = {}
        self._progress: dict[str, tuple[Progress, datetime]] = {}
        self._refused: dict[str, dict[str, Refusal]] = {}
        self._warnings: dict[str, str] = {}
        self._lacks_pods: dict[str, dict[str, datetime]] = {}
        """Since when Jobs lack pods, by name of the Job, by uid of the FineTuneJob."""
        self._owners: dict[str, Owner] = {}
        """Owner of each child, by uid."""
        self._marks: dict[str, tuple[Any, ...]] = {}

    # --- changes --------------------------------------------------------------------------------

    def put(self, kind: str, obj: Object) -> str | None:
        """Add an object, or replace an older version of it. Returns the uid of its FineTuneJob;
        None for an object without one."""
        uid = obj["metadata"]["uid"]
        owner = owner_of(kind, obj)
        if owner is None:
            return self._disown(kind, uid)
        if self._removed.get(uid, -1) >= version_of(obj):
            return owner.uid
        obj = _trimmed(obj)
        if kind == names.KIND and manager_of(obj) != self._managed_by:
            self._references.put(obj)  # jobs of this operator may start from its model
            if uid in self._jobs:  # handed over
                self._remove_job(owner)
            return None
        if kind == names.KIND:
            self._put_in(self._jobs, uid, obj)
            self._references.put(self._jobs[uid])
            return owner.uid
        if kind == "Pod":
            self._note_pull(uid, obj)
        kinds = self._children.setdefault(owner, {k: {} for k in CHILD_KINDS})
        self._put_in(kinds[kind], uid, obj)
        self._owners[uid] = owner
        return owner.uid

    def _disown(self, kind: str, uid: str) -> str | None:
        """Forget a child that is none any more: its owner reference or its labels were removed.
        Returns the uid of the FineTuneJob that it belonged to, or None."""
        owner = self._owners.pop(uid, None)
        if owner is None:
            return None
        self._children.get(owner, {}).get(kind, {}).pop(uid, None)
        return owner.uid

    @staticmethod
    def _put_in(place: dict[str, Object], uid: str, obj: Object) -> None:
        known = place.get(uid)
        if known is None or version_of(known) <= version_of(obj):
            place[uid] = obj

    def remove(self, kind: str, obj: Object) -> str | None:
        """Remove an object that was deleted. Returns the uid of its FineTuneJob, or None."""
        uid = obj["metadata"]["uid"]
        owner = owner_of(kind, obj)
        if owner is None:
            return self._disown(kind, uid)
        # The response to a write of this process may arrive after the deletion event.
        self._removed[uid] = version_of(obj)
        while len(self._removed) > REMEMBERED_REMOVALS:
            self._removed.pop(next(iter(self._removed)))
        if kind == names.KIND:
            self._references.remove(obj)
            self._remove_job(owner)
            return owner.uid
        kinds = self._children.get(owner, {})
        kinds.get(kind, {}).pop(uid, None)
        self._warnings.pop(uid, None)
        self._owners.pop(uid, None)
        if kind == "Pod":
            self._pull_failing.pop(uid, None)
            if self._owned_job(owner) and container_status(obj).get("state"):
                self._gone_pods.setdefault(owner, {})[uid] = _ended(obj)
        self._forget_children(owner)
        return owner.uid

    def _owned_job(self, owner: Owner) -> Object | None:
        """The job of an owner, if it is in that namespace."""
        job = self._jobs.get(owner.uid)
        return job if job and job["metadata"]["namespace"] == owner.namespace else None

    def _forget_children(self, owner: Owner) -> None:
        if owner.uid not in self._jobs and not any(self._children.get(owner, {}).values()):
            self._children.pop(owner, None)

    def _remove_job(self, job: Owner) -> None:
        self._gone_pods.pop(job, None)
        for place in (self._jobs, self._progress, self._refused, self._marks, self._lacks_pods):
            place.pop(job.uid, None)
        self._forget_children(job)

    def _note_pull(self, uid: str, pod: Object) -> None:
        if pull_is_failing(pod):
            self._pull_failing.setdefault(uid, datetime.now(UTC))
        elif container_status(pod).get("state", {}).get("running"):
            self._pull_failing.pop(uid, None)

    def put_progress(self, uid: str, progress: Progress, time: datetime) -> None:
        """Keep the newest progress of a job's gang."""
        if uid in self._jobs:
            self._progress[uid] = (progress, time)

    def put_warning(self, uid: str, text: str) -> bool:
        """Keep the newest warning about a child; return whether it is new."""
        if self._warnings.get(uid) == text or uid not in self._owners:
            return False
        self._warnings[uid] = text
        return True

    def drop_warning(self, uid: str) -> None:
        """Forget the warning about a child that is not late any more."""
        self._warnings.pop(uid, None)

    def put_refusal(self, uid: str, child: str, refusal: Refusal | None) -> None:
        """Record that the API server refused a request about a child (``child_key``); None: that it
        accepted the request."""
        if refusal is not None:
            self._refused.setdefault(uid, {})[child] = refusal
        else:
            self._refused.get(uid, {}).pop(child, None)

    # --- reads --------------------------------------------------------------------------------

    def job(self, uid: str) -> Object | None:
        """The FineTuneJob with that uid."""
        return self._jobs.get(uid)

    def jobs(self) -> Iterator[Object]:
        """All FineTuneJobs."""
        return iter(list(self._jobs.values()))

    def affected(self, kind: str, obj: Object) -> list[str]:
        """Uids of other jobs that a change of an object may affect: jobs that start from the model
        of a FineTuneJob. A job's progress affects none."""
        if kind != names.KIND:
            return []
        uid, seen = obj["metadata"]["uid"], model_mark(obj)
        if uid in self._jobs:
            if self._marks.get(uid) == seen:
                return []
            self._marks[uid] = seen
        return self._references.dependents(obj)

    def children(self, uid: str, kind: str) -> list[Object]:
        """A job's children of one kind."""
        job = self._jobs.get(uid)
        return self._children_of(job, kind) if job is not None else []

    def _children_of(self, job: Object, kind: str) -> list[Object]:
        return list(self._children.get(_as_owner(job), {}).get(kind, {}).values())

    def objects(self, kind: str) -> list[Object]:
        """All objects of one kind."""
        if kind == names.KIND:
            return list(self._jobs.values())
        return [o for kinds in self._children.values() for o in kinds[kind].values()]

    def observed(self, uid: str) -> Observed:
        """Everything that ``decide`` sees of a job's children, and of the jobs that it refers
        to."""
        job = self._jobs.get(uid)
        if job is None:
            return Observed()
        progress, time = self._progress.get(uid, (None, None))
        named = self._references.chain(job)
        found = observe(
            config_maps=self.children(uid, "ConfigMap"),
            jobs=self.children(uid, "Job"),
            services=self.children(uid, "Service"),
            pods=self.children(uid, "Pod"),
            gone=self._gone_pods.get(_as_owner(job), {}).values(),
            pull_failing_since=self._pull_failing,
            warnings=self._warnings,
            progress=progress,
            progress_time=time,
            refused=self._refused.get(uid),
            models=[model_view(o, self._children_of(o, "ConfigMap")) for o in named],
        )
        since = self._lacks_pods.get(uid, {})
        lacking = {name: since.get(name, datetime.now(UTC)) for name in found.lacking_pods()}
        self._lacks_pods[uid] = lacking
        return replace(found, lacks_pods_since=lacking)


def _trimmed(obj: Object) -> Object:
    """An object without the parts that no pass reads, which are most of its memory: managed fields,
    and the copy that ``kubectl apply`` leaves in an annotation."""
    meta = {k: v for k, v in obj["metadata"].items() if k != "managedFields"}
    if annotations := meta.get("annotations"):
        meta["annotations"] = {k: v for k, v in annotations.items() if k != _LAST_APPLIED}
    return {**obj, "metadata": meta}


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
