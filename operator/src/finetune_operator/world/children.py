"""The objects that the operator has created for a job: run specs, Jobs, Services and
NetworkPolicies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from finetune_api import names
from finetune_api.names import Role
from finetune_api.run_spec import RunSpec
from finetune_operator.config import ANNOTATION_ACCESS, ANNOTATION_IMAGE, ANNOTATION_OUTCOME
from finetune_operator.world.objects import Object, child_labels, parse_time
from finetune_operator.world.pods import PodView
from finetune_operator.world.stored import read_run_spec


@dataclass(frozen=True, slots=True)
class StoredRunSpec:
    """The ConfigMap with the run spec of one revision of a run."""

    name: str
    run: str
    number: int
    revision: int
    image: str
    created: datetime | None = None
    outcome: str | None = None
    run_spec: RunSpec | None = None
    """None if this release's models refuse it; ``problems`` has the reasons."""
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class JobView:
    """The Job of a stage."""

    name: str
    role: Role
    run: str
    revision: int
    created: datetime
    uid: str = ""
    started: datetime | None = None
    suspended: bool = False
    in_queue: bool = False
    """Suspended, with the label of a Kueue queue."""
    complete: bool = False
    failed: bool = False
    """Failed, or about to fail: the Job controller waits for pods that may never end."""
    failed_at: datetime | None = None
    failure_reason: str = ""
    failure_message: str = ""
    stopping: bool = False
    """The operator has set the Job's deadline to 0 seconds, which terminates its pods."""
    deleting: bool = False
    parallelism: int = 1
    """Number of its pods."""
    completed: frozenset[int] = frozenset()
    """Completion indexes that have succeeded; their pods may be gone."""
    warning: str = ""
    """Kubernetes' newest warning about the Job, read once it lacks pods; Kueue's words about a
    queued one."""

    @property
    def finished(self) -> bool:
        return self.complete or self.failed

    @property
    def makes_pods(self) -> bool:
        """Whether the Job controller makes the Job's pods, and replaces failed ones."""
        return not (self.finished or self.suspended or self.deleting)

    @property
    def stage(self) -> tuple[Role, str, int]:
        """Stage, run and revision, as its pods have them."""
        return self.role, self.run, self.revision

    def missing(self, pods: Iterable[PodView]) -> list[int]:
        """Completion indexes that have neither succeeded nor a pod, apart from failed ones, among
        the Job's pods."""
        there = self.completed | {p.index for p in pods if p.phase != "Failed"}
        return [index for index in range(self.parallelism) if index not in there]


@dataclass(frozen=True, slots=True)
class ServiceView:
    """The headless Service of a gang."""

    name: str
    run: str
    revision: int


@dataclass(frozen=True)
class PolicyView:
    """The NetworkPolicy of a run."""

    name: str
    run: str
    access: str = ""
    """Digest of the settings that it was rendered from (``NetworkAccess.digest``)."""


def stored_run_spec(obj: Object) -> StoredRunSpec | None:
    """The run spec in a ConfigMap, or None for a ConfigMap without one."""
    labels = obj["metadata"].get("labels") or {}
    annotations = obj["metadata"].get("annotations") or {}
    run, revision = labels.get(names.LABEL_RUN, ""), labels.get(names.LABEL_REVISION, "")
    text = (obj.get("data") or {}).get(names.RUN_SPEC_KEY)
    number = run.partition("-")[0]
    if text is None or not number.isdigit() or not revision.isdigit():
        return None
    run_spec, problems = read_run_spec(text)
    return StoredRunSpec(
        name=obj["metadata"]["name"],
        run=run,
        number=int(number),
        revision=int(revision),
        image=annotations.get(ANNOTATION_IMAGE, ""),
        created=parse_time(obj["metadata"].get("creationTimestamp")),
        outcome=annotations.get(ANNOTATION_OUTCOME),
        run_spec=run_spec,
        problems=tuple(problems),
    )


def job_view(obj: Object) -> JobView | None:
    """The Job of a stage, or None for any other Job."""
    labels = child_labels(obj)
    created = parse_time(obj["metadata"].get("creationTimestamp"))
    if labels is None or created is None:
        return None
    status = obj.get("status") or {}
    true = {c["type"]: c for c in status.get("conditions") or [] if c.get("status") == "True"}
    suspended = bool(obj.get("spec", {}).get("suspend"))
    bad = true.get("Failed") or true.get("FailureTarget") or {}
    return JobView(
        name=obj["metadata"]["name"],
        uid=obj["metadata"].get("uid", ""),
        role=labels.role,
        run=labels.run,
        revision=labels.revision,
        created=created,
        started=parse_time(status.get("startTime")),
        suspended=suspended,
        in_queue=suspended and names.LABEL_QUEUE in obj["metadata"]["labels"],
        complete="Complete" in true or "SuccessCriteriaMet" in true,
        failed=bool(bad),
        failed_at=parse_time(bad.get("lastTransitionTime")),
        failure_reason=bad.get("reason", ""),
        failure_message=bad.get("message", ""),
        stopping=obj.get("spec", {}).get("activeDeadlineSeconds") == 0,
        deleting="deletionTimestamp" in obj["metadata"],
        parallelism=obj.get("spec", {}).get("parallelism", 1),
        completed=_indexes(status.get("completedIndexes") or ""),
    )


def _indexes(text: str) -> frozenset[int]:
    """The indexes of a Job's ``completedIndexes``: ``0,2-4`` → 0, 2, 3, 4."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first.isdigit() and (last or first).isdigit():
            found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def service_view(obj: Object) -> ServiceView | None:
    """The Service of a gang, or None for any other Service."""
    labels = child_labels(obj)
    return ServiceView(obj["metadata"]["name"], labels.run, labels.revision) if labels else None


def policy_view(obj: Object) -> PolicyView | None:
    """The NetworkPolicy of a run, or None for any other NetworkPolicy."""
    meta = obj["metadata"]
    run = (meta.get("labels") or {}).get(names.LABEL_RUN)
    access = (meta.get("annotations") or {}).get(ANNOTATION_ACCESS, "")
    return PolicyView(meta["name"], run, access) if run else None
