"""The FineTuneJobs and their children in memory, as last seen: by a watch, or in the API server's
response to a write of this process.

A pass therefore sees the writes of the pass before it although the watch lags behind. An older
resourceVersion never replaces a newer one, and a removed object does not come back by a late
response.

Of a child only its view is kept, made once per version: the objects themselves would take ten times
the memory. A version with the same view, or the echo of a write of this process, needs no pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from finetune_api import names
from finetune_api.results import Progress
from finetune_operator.world.children import StoredRunSpec
from finetune_operator.world.models import model_mark, model_view
from finetune_operator.world.objects import Object
from finetune_operator.world.observe import VIEWS, Observed, Refusal, View, observe
from finetune_operator.world.owners import Owner, as_owner, manager_of, owner_of, version_of
from finetune_operator.world.pods import PodView, pod_view
from finetune_operator.world.references import References
from finetune_operator.world.stored import StoredJob

CHILD_KINDS: Final = tuple(VIEWS)
REMEMBERED_REMOVALS: Final = 2000
"""More than are deleted within the timeout of a request."""
_LAST_APPLIED: Final = "kubectl.kubernetes.io/last-applied-configuration"


class Child(NamedTuple):
    """A child as the store keeps it."""

    owner: Owner
    version: int
    view: View | None


class Store:
    """FineTuneJobs by uid, and their children by owner."""

    def __init__(self, managed_by: str = "") -> None:
        """
        Args:
            managed_by: name of this operator; jobs with another ``spec.managedBy`` are kept only
                as sources of models.
        """
        self._managed_by = managed_by
        self._jobs: dict[str, StoredJob] = {}
        self._references = References()
        self._children: dict[Owner, dict[str, dict[str, Child]]] = {}
        self._removed: dict[str, int] = {}
        self._gone_pods: dict[Owner, dict[str, PodView]] = {}
        self._pull_failing: dict[str, datetime] = {}
        self._progress: dict[str, tuple[Progress, datetime]] = {}
        self._refused: dict[str, dict[str, Refusal]] = {}
        self._warnings: dict[str, str] = {}
        self._node_problems: dict[str, str] = {}
        """Problems of the nodes of failed pods, by uid of the pod."""
        self._lacks_pods: dict[str, dict[str, datetime]] = {}
        """Since when Jobs lack pods, by name of the Job, by uid of the FineTuneJob."""
        self._owners: dict[str, Owner] = {}
        """Owner of each child, by uid."""
        self._marks: dict[str, tuple[Any, ...]] = {}

    # --- changes --------------------------------------------------------------------------------

    def put(self, kind: str, obj: Object) -> str | None:
        """Add an object, or replace an older version of it. Returns the uid of the FineTuneJob that
        needs a pass; None if no pass would see a difference."""
        uid = obj["metadata"]["uid"]
        owner = owner_of(kind, obj)
        if owner is None:
            return self._disown(kind, uid)
        if self._removed.get(uid, -1) >= version_of(obj):
            return None
        if kind == names.KIND:
            return self._put_job(owner, _trimmed(obj))
        return self._put_child(kind, uid, Child(owner, version_of(obj), VIEWS[kind](obj)))

    def _put_job(self, job: Owner, obj: Object) -> str | None:
        known = self._jobs.get(job.uid)
        if manager_of(obj) != self._managed_by:
            self._references.put(obj)  # jobs of this operator may start from its model
            if known is not None:  # handed over
                self._remove_job(job)
            return None
        if known is not None and not _is_newer(version_of(obj), version_of(known.raw)):
            return None
        self._jobs[job.uid] = StoredJob(obj, known)
        self._references.put(obj)
        return job.uid

    def _put_child(self, kind: str, uid: str, child: Child) -> str | None:
        kinds = self._children.setdefault(child.owner, {k: {} for k in CHILD_KINDS})
        known = kinds[kind].get(uid)
        if known is not None and not _is_newer(child.version, known.version):
            return None
        if isinstance(child.view, PodView):
            self._note_pull(uid, child.view)
        kinds[kind][uid] = child
        self._owners[uid] = child.owner
        seen = known is not None and known.view == child.view
        return None if seen else child.owner.uid

    def _disown(self, kind: str, uid: str) -> str | None:
        """Forget a child that is none any more: its owner reference or its labels were removed.
        Returns the uid of the FineTuneJob that it belonged to, or None."""
        owner = self._owners.pop(uid, None)
        if owner is None:
            return None
        self._children.get(owner, {}).get(kind, {}).pop(uid, None)
        return owner.uid

    def remove(self, kind: str, obj: Object) -> str | None:
        """Remove an object that was deleted. Returns the uid of its FineTuneJob, or None."""
        uid = obj["metadata"]["uid"]
        owner = owner_of(kind, obj)
        if owner is None:
            return self._disown(kind, uid)
        self._note_removal(uid, version_of(obj))
        if kind == names.KIND:
            self._references.remove(obj)
            self._remove_job(owner)
        else:
            self._remove_child(kind, uid, owner, pod_view(obj) if kind == "Pod" else None)
        return owner.uid

    def remove_missing(self, kind: str, uid: str) -> list[str]:
        """Remove an object that no longer exists, although no watch has reported its deletion.
        Returns the uids of the FineTuneJobs that need a pass."""
        if kind == names.KIND:
            job = self._jobs[uid].raw
            self.remove(kind, job)
            return [uid, *self.affected(kind, job)]
        owner = self._owners[uid]
        child = self._children[owner][kind][uid]
        self._note_removal(uid, child.version)
        self._remove_child(kind, uid, owner, child.view)
        return [owner.uid]

    def _note_removal(self, uid: str, version: int) -> None:
        """The response to a write of this process may arrive after the deletion event."""
        self._removed[uid] = version
        while len(self._removed) > REMEMBERED_REMOVALS:
            self._removed.pop(next(iter(self._removed)))

    def _remove_child(self, kind: str, uid: str, owner: Owner, last: View | None) -> None:
        """``last`` is the last view of a pod."""
        self._children.get(owner, {}).get(kind, {}).pop(uid, None)
        self._warnings.pop(uid, None)
        self._node_problems.pop(uid, None)
        self._owners.pop(uid, None)
        self._pull_failing.pop(uid, None)
        gone = last.gone(datetime.now(UTC)) if isinstance(last, PodView) else None
        if gone is not None and self._owned_job(owner):
            self._gone_pods.setdefault(owner, {})[uid] = gone
        self._forget_children(owner)

    def _owned_job(self, owner: Owner) -> StoredJob | None:
        """The job of an owner, if it is in that namespace."""
        job = self._jobs.get(owner.uid)
        return job if job and job.metadata["namespace"] == owner.namespace else None

    def _forget_children(self, owner: Owner) -> None:
        if owner.uid not in self._jobs and not any(self._children.get(owner, {}).values()):
            self._children.pop(owner, None)

    def _remove_job(self, job: Owner) -> None:
        self._gone_pods.pop(job, None)
        for place in (self._jobs, self._progress, self._refused, self._marks, self._lacks_pods):
            place.pop(job.uid, None)
        self._forget_children(job)

    def _note_pull(self, uid: str, pod: PodView) -> None:
        if pod.pull_is_failing:
            self._pull_failing.setdefault(uid, datetime.now(UTC))
        elif pod.running:
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

    def put_node_problem(self, uid: str, text: str) -> bool:
        """Keep the problems of the node of a failed pod; return whether they are new."""
        if self._node_problems.get(uid) == text or uid not in self._owners:
            return False
        self._node_problems[uid] = text
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

    def job(self, uid: str) -> StoredJob | None:
        """The FineTuneJob with that uid."""
        return self._jobs.get(uid)

    def jobs(self) -> Iterator[Object]:
        """All FineTuneJobs."""
        return iter([job.raw for job in self._jobs.values()])

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

    def children(self, uid: str, kind: str) -> dict[str, View | None]:
        """Views of a job's children of one kind, by uid."""
        job = self._jobs.get(uid)
        return self._views(job.raw, kind) if job is not None else {}

    def _views(self, job: Object, kind: str) -> dict[str, View | None]:
        found = self._children.get(as_owner(job), {}).get(kind, {})
        return {uid: child.view for uid, child in found.items()}

    def versions(self, kind: str, namespace: str | None) -> dict[str, int]:
        """resourceVersion by uid of all objects of one kind, in one namespace or in all."""
        if kind == names.KIND:
            jobs = ((as_owner(j.raw), u, version_of(j.raw)) for u, j in self._jobs.items())
            return {
                u: version for owner, u, version in jobs if namespace in (None, owner.namespace)
            }
        return {
            uid: child.version
            for owner, kinds in self._children.items()
            for uid, child in kinds[kind].items()
            if namespace in (None, owner.namespace)
        }

    def observed(self, uid: str) -> Observed:
        """Everything that ``decide`` sees of a job's children, and of the jobs that it refers
        to."""
        job = self._jobs.get(uid)
        if job is None:
            return Observed()
        progress, time = self._progress.get(uid, (None, None))
        named = self._references.chain(job.raw)
        found = observe(
            views={kind: self._views(job.raw, kind) for kind in CHILD_KINDS},
            gone=self._gone_pods.get(as_owner(job.raw), {}).values(),
            pull_failing_since=self._pull_failing,
            warnings=self._warnings,
            node_problems=self._node_problems,
            progress=progress,
            progress_time=time,
            refused=self._refused.get(uid),
            models=[model_view(o, self._run_specs(o)) for o in named],
        )
        since = self._lacks_pods.get(uid, {})
        lacking = {name: since.get(name, datetime.now(UTC)) for name in found.lacking_pods()}
        self._lacks_pods[uid] = lacking
        return replace(found, lacks_pods_since=lacking)

    def _run_specs(self, job: Object) -> list[StoredRunSpec]:
        views = self._views(job, "ConfigMap").values()
        return [view for view in views if isinstance(view, StoredRunSpec)]


def _is_newer(version: int, known: int) -> bool:
    return version > known or version == 0


def _trimmed(obj: Object) -> Object:
    """An object without the parts that no pass reads, which are most of its memory: managed fields,
    and the copy that ``kubectl apply`` leaves in an annotation."""
    meta = {k: v for k, v in obj["metadata"].items() if k != "managedFields"}
    if annotations := meta.get("annotations"):
        meta["annotations"] = {k: v for k, v in annotations.items() if k != _LAST_APPLIED}
    return {**obj, "metadata": meta}
