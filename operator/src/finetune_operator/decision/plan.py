"""The output of ``decide``: all actions of one pass, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

from finetune_api.names import Role
from finetune_api.run_spec import RunSpec
from finetune_api.status import AvoidedNode, FailureStatus, QueueStatus
from finetune_operator.config import GRACE_SECONDS
from finetune_operator.decision.base_model import Wait
from finetune_operator.decision.incidents import Incidents


@dataclass(frozen=True)
class Subject:
    """The FineTuneJob that a plan is for."""

    namespace: str
    name: str
    uid: str
    generation: int


@dataclass(frozen=True)
class CurrentRun:
    """The current run of a job, from which its children are rendered."""

    number: int
    id: str
    revision: int
    run_spec: RunSpec
    image: str
    outcome: str | None = None
    """Complete or Failed once the run has ended."""
    recorded: bool = False
    """Whether the run spec's ConfigMap exists."""
    wait: Wait | None = None
    """Why the run cannot begin yet: its base model is not published, so no child is created."""
    avoid_nodes: tuple[str, ...] = ()
    """Nodes that a gang made in this pass avoids."""
    grace_seconds: int = GRACE_SECONDS
    """terminationGracePeriodSeconds of a gang made in this pass."""


@dataclass(frozen=True)
class Recreation:
    """The begin of a run's next revision with the same spec, in this pass."""

    why: str
    incidents: Incidents
    """Incidents that the revision before has shown."""
    wait: QueueStatus | None = None
    """The wait before the gang tries again; None: it tries at once."""
    avoided: tuple[AvoidedNode, ...] = ()
    """Nodes that the next gang avoids."""


Kind = Literal["ConfigMap", "NetworkPolicy", "Service", "Job", "Pod"]


@dataclass(frozen=True)
class Create:
    """A child to create: the ConfigMap or NetworkPolicy of a run, or the Service or Job of a stage
    (``role``). Of existing children, only a NetworkPolicy is changed this way, to other
    settings."""

    kind: Kind
    role: Role | None = None


@dataclass(frozen=True)
class Change:
    """A change of an existing child: stop it, or record the outcome of the run."""

    kind: Kind
    name: str
    patch: dict[str, Any]


@dataclass(frozen=True)
class Delete:
    """A child to delete; its pods end with their grace period."""

    kind: Kind
    name: str


@dataclass(frozen=True)
class Event:
    """An Event on the FineTuneJob."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


Urgency = Literal["AtOnce", "Soon", "Later"]
"""When a changed status must be written: at once, or together with changes of the next second or
of the next minute."""


@dataclass(frozen=True)
class Plan:
    """One pass: deletions, then creations and changes, then status, then events."""

    subject: Subject
    run: CurrentRun | None = None
    delete: tuple[Delete, ...] = ()
    create: tuple[Create, ...] = ()
    change: tuple[Change, ...] = ()
    status: dict[str, Any] | None = None
    """The whole new status, or None to keep the stored status."""
    urgency: Urgency = "AtOnce"
    """When status must be written."""
    events: tuple[Event, ...] = ()
    requeue_after: timedelta | None = None
    """Time to the next pass, unless an event triggers one earlier."""


@dataclass
class Actions:
    """The actions of a pass, under construction."""

    delete: list[Delete] = field(default_factory=list)
    create: list[Create] = field(default_factory=list)
    change: list[Change] = field(default_factory=list)
    wake_ups: list[datetime] = field(default_factory=list)

    def wake_at(self, time: datetime) -> None:
        """Request another pass at that time, even if no event triggers one."""
        self.wake_ups.append(time)

    def requeue_after(self, now: datetime) -> timedelta | None:
        """Time to the nearest wake-up, at least one second; None without wake-ups."""
        if not self.wake_ups:
            return None
        return max(min(self.wake_ups) - now, timedelta(seconds=1))


State = Literal["Waiting", "Suspended", "Active", "Failed", "Complete"]
"""State of a run after a pass: it waits for its base model, is suspended, has a stage at work, or
has ended."""


@dataclass(frozen=True)
class Decision:
    """The decision of a pass about a run."""

    state: State
    actions: Actions
    failure: FailureStatus | None = None
    """Why the run has failed; set in state Failed only."""
    queue: QueueStatus | None = None
    """The wait for nodes of a gang that has given its nodes back; None: there is none."""
