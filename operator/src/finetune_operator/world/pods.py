"""A pod as decisions see it: its placement, and the state and report of its one container."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from typing import Any, Final

from finetune_api import names
from finetune_api.base import read_known
from finetune_api.names import Role
from finetune_api.results import Termination
from finetune_operator.world.objects import Object, child_labels, parse_time

INDEX_ANNOTATION: Final = "batch.kubernetes.io/job-completion-index"
PULL_REASONS: Final = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")


@dataclass(frozen=True, slots=True)
class PodView:
    """A pod of a child Job and its one container."""

    name: str
    role: Role
    run: str
    revision: int
    index: int
    """Completion index: the node rank of a gang's pod, or the number of a worker."""
    created: datetime
    job: str = ""
    """uid of the Job that made the pod."""
    phase: str = "Pending"
    node: str | None = None
    ip: str | None = None
    scheduled: bool = False
    scheduled_at: datetime | None = None
    unschedulable: str | None = None
    """The scheduler's message while it finds no node."""
    pod_group: str | None = None
    """PodGroup whose pods the scheduler places all at once. The Job controller makes one for each
    gang in clusters with gang scheduling (feature gate WorkloadWithJob)."""
    started: datetime | None = None
    """When the container started."""
    finished: datetime | None = None
    """When the container ended."""
    running: bool = False
    exit_code: int | None = None
    exit_reason: str = ""
    """The kubelet's reason for the container's end, e.g. OOMKilled."""
    reason: str = ""
    """Reason in the pod's own status, e.g. Evicted."""
    message: str = ""
    """Message in the pod's own status."""
    disruption: str | None = None
    """Reason of condition DisruptionTarget: Kubernetes disrupted the pod."""
    disrupted_at: datetime | None = None
    """When that condition became true."""
    ready: bool = True
    """Condition Ready: false once the pod's node is not reachable, or before the pod runs."""
    ready_changed: datetime | None = None
    """When that condition last changed."""
    termination: Termination | None = None
    """The container's termination message; None if it left no valid one."""
    exit_text: str = ""
    """The container's termination message as it is, e.g. the runtime's error of a container that
    could not start."""
    waiting_reason: str | None = None
    """The kubelet's reason why the container does not start yet."""
    waiting_message: str = ""
    image: str = ""
    pull_failing_since: datetime | None = None
    deleted_by: datetime | None = None
    """End of the grace period of a pod that is being deleted."""
    limits: Mapping[str, str] = field(default_factory=dict)
    warning: str = ""
    """Kubernetes' newest warning about the pod, read once the pod is late."""
    node_problem: str = ""
    """Problems of the node of a failed pod, in the words of agents for node health."""

    @property
    def ended(self) -> bool:
        return self.phase in ("Succeeded", "Failed")

    @property
    def active(self) -> bool:
        """Whether the pod runs or may run: it has not ended, and is not being deleted."""
        return not self.ended and self.deleted_by is None

    @property
    def is_starting(self) -> bool:
        """Whether the pod has a node, and its container has not started yet."""
        begun = self.started is not None or self.running or self.exit_code is not None
        return self.active and self.scheduled and not begun

    @property
    def on_lost_node(self) -> bool:
        """Whether the pod is to be deleted, but its node is not reachable: it may stay for ever."""
        lost = self.disruption == "DeletionByTaintManager" and not self.ready
        return lost and self.deleted_by is not None and not self.ended

    @property
    def only_sidecars_run(self) -> bool:
        """Whether the trainer has ended, but another container keeps the pod running."""
        return self.active and self.exit_code is not None

    @property
    def is_disrupted(self) -> bool:
        """Whether Kubernetes took the pod away for reasons outside of the pod. Of what the kubelet
        does, the pod's own reason tells it."""
        return self.disruption is not None and self.disruption != "TerminationByKubelet"

    @property
    def pull_is_failing(self) -> bool:
        """Whether the kubelet currently fails to pull the pod's image."""
        return self.waiting_reason in PULL_REASONS

    def gone(self, now: datetime) -> PodView | None:
        """The view of a pod that was deleted: a container that was last seen running ends now. A
        pod whose container had not started is gone now, however long its grace period is. None for
        a pod without a container."""
        if self.running:
            return replace(self, running=False, finished=now, exit_code=137)
        if self.exit_code is None and self.waiting_reason is not None:
            return replace(self, deleted_by=now)
        return self if self.exit_code is not None else None


def pod_view(obj: Object) -> PodView | None:
    """A pod of a child Job, or None for any other pod."""
    labels = child_labels(obj)
    meta, status = obj["metadata"], obj.get("status") or {}
    created = parse_time(meta.get("creationTimestamp"))
    if labels is None or created is None:
        return None
    index = (meta.get("annotations") or {}).get(INDEX_ANNOTATION, "0")
    spec = obj.get("spec") or {}
    container = _container(spec)
    return PodView(
        name=meta["name"],
        role=labels.role,
        run=labels.run,
        revision=labels.revision,
        index=int(index) if index.isdigit() else 0,
        created=created,
        job=next((o["uid"] for o in meta.get("ownerReferences") or [] if o.get("controller")), ""),
        phase=status.get("phase") or "Pending",
        node=spec.get("nodeName"),
        ip=status.get("podIP"),
        scheduled=bool(spec.get("nodeName")),
        pod_group=(spec.get("schedulingGroup") or {}).get("podGroupName"),
        reason=status.get("reason") or "",
        message=status.get("message") or "",
        image=container.get("image") or "",
        deleted_by=parse_time(meta.get("deletionTimestamp")),
        limits=(container.get("resources") or {}).get("limits") or {},
        **_of_conditions(status),
        **(_of_container_state(container_status(obj).get("state") or {}) | _of_init(status)),
    )


def _of_conditions(status: Object) -> dict[str, Any]:
    """Fields of a PodView that come from the pod's conditions."""
    conditions = {c["type"]: c for c in status.get("conditions") or []}
    scheduled = conditions.get("PodScheduled") or {}
    disruption = conditions.get("DisruptionTarget") or {}
    found: dict[str, Any] = {}
    if scheduled.get("status") == "True":
        found["scheduled_at"] = parse_time(scheduled.get("lastTransitionTime"))
    elif scheduled.get("status") == "False":
        found["unschedulable"] = scheduled.get("message") or "no node fits"
    if disruption.get("status") == "True":
        found["disruption"] = disruption.get("reason") or "Disrupted"
        found["disrupted_at"] = parse_time(disruption.get("lastTransitionTime"))
    ready = conditions.get("Ready") or {}
    found["ready"] = ready.get("status", "True") == "True"
    found["ready_changed"] = parse_time(ready.get("lastTransitionTime"))
    return found


def _of_container_state(state: Object) -> dict[str, Any]:
    """Fields of a PodView that come from the state of its container."""
    running, ended = state.get("running") or {}, state.get("terminated") or {}
    waiting = state.get("waiting") or {}
    return {
        "started": parse_time(running.get("startedAt") or ended.get("startedAt")),
        "finished": parse_time(ended.get("finishedAt")),
        "running": bool(running),
        "exit_code": ended.get("exitCode"),
        "exit_reason": ended.get("reason") or "",
        "termination": _termination(ended.get("message")),
        "exit_text": ended.get("message") or "",
        "waiting_reason": waiting.get("reason"),
        "waiting_message": waiting.get("message") or "",
    }


def _of_init(status: Object) -> dict[str, Any]:
    """Fields of a PodView from an init container (injected, e.g. by a service mesh) that does not
    start."""
    for found in status.get("initContainerStatuses") or []:
        waiting = (found.get("state") or {}).get("waiting") or {}
        if waiting.get("reason") not in (None, "PodInitializing"):
            text = f"init container {found.get('name')}: {waiting.get('message') or 'no message'}"
            return {"waiting_reason": waiting["reason"], "waiting_message": text}
    return {}


def _container(spec: Object) -> Object:
    found = [c for c in spec.get("containers") or [] if c.get("name") == names.CONTAINER]
    return found[0] if found else {}


def container_status(pod: Object) -> Object:
    """Status of a pod's trainer container; empty before the kubelet has written one."""
    statuses = (pod.get("status") or {}).get("containerStatuses") or []
    found = [c for c in statuses if c.get("name") == names.CONTAINER]
    return found[0] if found else {}


@lru_cache(maxsize=256)
def _termination(text: str | None) -> Termination | None:
    """An ended pod changes a few times more within seconds, and a message takes 4 KiB."""
    try:
        return read_known(Termination, text) if text else None
    except ValueError:  # not JSON, or not a termination message
        return None
