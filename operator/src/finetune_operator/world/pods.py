"""A pod as decisions see it: where it is, what its one container did, and its last word."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from pydantic import ValidationError

from finetune_api import names
from finetune_api.names import Role
from finetune_api.results import Termination
from finetune_operator.world.objects import Object, parse_time, place_of

INDEX_ANNOTATION: Final = "batch.kubernetes.io/job-completion-index"
PULL_REASONS: Final = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")


@dataclass(frozen=True)
class PodView:
    """A pod of a child Job and its one container."""

    name: str
    role: Role
    run: str
    revision: int
    index: int
    created: datetime
    phase: str = "Pending"
    node: str | None = None
    ip: str | None = None
    scheduled: bool = False
    scheduled_at: datetime | None = None
    unschedulable: str | None = None
    """The scheduler's message while it finds no node."""
    started: datetime | None = None
    finished: datetime | None = None
    running: bool = False
    exit_code: int | None = None
    exit_reason: str = ""
    reason: str = ""
    message: str = ""
    disruption: str | None = None
    termination: Termination | None = None
    waiting: str | None = None
    waiting_message: str = ""
    image: str = ""
    pull_failing_since: datetime | None = None
    deleted_by: datetime | None = None
    """End of the grace period of a pod that is being deleted."""
    limits: Mapping[str, str] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        return self.phase in ("Succeeded", "Failed")


def pod_view(obj: Object, pull_failing_since: datetime | None = None) -> PodView | None:
    """A pod of a child Job, or None where its labels are not ours."""
    place = place_of(obj)
    meta, spec, status = obj["metadata"], obj.get("spec") or {}, obj.get("status") or {}
    created = parse_time(meta.get("creationTimestamp"))
    if place is None or created is None:
        return None
    role, run, revision = place
    index = (meta.get("annotations") or {}).get(INDEX_ANNOTATION, "0")
    conditions = {c["type"]: c for c in status.get("conditions") or []}
    scheduled = conditions.get("PodScheduled") or {}
    unschedulable = scheduled.get("status") == "False"
    disruption = conditions.get("DisruptionTarget") or {}
    container = _container(spec)
    state = container_status(obj).get("state") or {}
    running, ended = state.get("running") or {}, state.get("terminated") or {}
    waiting = state.get("waiting") or {}
    return PodView(
        name=meta["name"],
        role=role,
        run=run,
        revision=revision,
        index=int(index) if index.isdigit() else 0,
        created=created,
        phase=status.get("phase") or "Pending",
        node=spec.get("nodeName"),
        ip=status.get("podIP"),
        scheduled=bool(spec.get("nodeName")),
        scheduled_at=parse_time(scheduled.get("lastTransitionTime"))
        if scheduled.get("status") == "True"
        else None,
        unschedulable=scheduled.get("message") or "no node fits" if unschedulable else None,
        started=parse_time(running.get("startedAt") or ended.get("startedAt")),
        finished=parse_time(ended.get("finishedAt")),
        running=bool(running),
        exit_code=ended.get("exitCode"),
        exit_reason=ended.get("reason") or "",
        reason=status.get("reason") or "",
        message=status.get("message") or "",
        disruption=(disruption.get("reason") or "Disrupted")
        if disruption.get("status") == "True"
        else None,
        termination=_termination(ended.get("message")),
        waiting=waiting.get("reason"),
        waiting_message=waiting.get("message") or "",
        image=container.get("image") or "",
        pull_failing_since=pull_failing_since,
        deleted_by=parse_time(meta.get("deletionTimestamp")),
        limits=(container.get("resources") or {}).get("limits") or {},
    )


def _container(spec: Object) -> Object:
    found = [c for c in spec.get("containers") or [] if c.get("name") == names.CONTAINER]
    return found[0] if found else {}


def container_status(pod: Object) -> Object:
    """Status of a pod's trainer container; empty before the kubelet wrote one."""
    statuses = (pod.get("status") or {}).get("containerStatuses") or []
    found = [c for c in statuses if c.get("name") == names.CONTAINER]
    return found[0] if found else {}


def pull_is_failing(pod: Object) -> bool:
    """Whether the kubelet cannot get the pod's image just now."""
    waiting = (container_status(pod).get("state") or {}).get("waiting") or {}
    return waiting.get("reason") in PULL_REASONS


def _termination(text: str | None) -> Termination | None:
    try:
        return Termination.model_validate_json(text) if text else None
    except ValidationError:
        return None
