"""What ``decide`` returns: everything that one pass does, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

from finetune_api.names import Role
from finetune_api.run_spec import RunSpec
from finetune_api.status import FailureStatus
from finetune_operator.decision.base_model import Wait


@dataclass(frozen=True)
class Subject:
    """The FineTuneJob that a plan is for."""

    namespace: str
    name: str
    uid: str
    generation: int


@dataclass(frozen=True)
class CurrentRun:
    """The run that a job is at, and what its children are rendered from."""

    number: int
    id: str
    revision: int
    run_spec: RunSpec
    image: str
    restarts_before: int = 0
    """Incidents of earlier revisions that do not count against failurePolicy.maxRestarts."""
    outcome: str | None = None
    """Complete or Failed once the run has ended."""
    recorded: bool = False
    """Whether the run spec is in the cluster already."""
    wait: Wait | None = None
    """Why the run cannot begin yet: the run spec lacks the model to start from, so no child is
    made."""


Kind = Literal["ConfigMap", "Service", "Job", "Pod"]


@dataclass(frozen=True)
class Create:
    """A child to make: the run spec, or the Service or Job of a stage. One that exists is never
    changed by it."""

    kind: Kind
    role: Role | None = None


@dataclass(frozen=True)
class Change:
    """A change of a child that exists: suspend, stop, or note the outcome of the run."""

    kind: Kind
    name: str
    patch: dict[str, Any]


@dataclass(frozen=True)
class Delete:
    """A child to delete; its pods follow with their grace period."""

    kind: Kind
    name: str


@dataclass(frozen=True)
class Event:
    """An Event on the FineTuneJob."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(frozen=True)
class Plan:
    """One pass: deletions, then creations and changes, then status, then events."""

    subject: Subject
    run: CurrentRun | None = None
    delete: tuple[Delete, ...] = ()
    create: tuple[Create, ...] = ()
    change: tuple[Change, ...] = ()
    status: dict[str, Any] | None = None
    """The whole new status, or None where the stored one stays."""
    events: tuple[Event, ...] = ()
    requeue_after: timedelta | None = None
    """Time to the next pass where no event causes one before."""


@dataclass
class Actions:
    """The actions of a pass, while they are collected."""

    delete: list[Delete] = field(default_factory=list)
    create: list[Create] = field(default_factory=list)
    change: list[Change] = field(default_factory=list)
    wake_ups: list[datetime] = field(default_factory=list)

    def wake_at(self, time: datetime) -> None:
        """Make another pass at that time, force is observed until then."""
        self.wake_ups.append(time)

    def requeue_after(self, now: datetime) -> timedelta | None:
        """Time to the nearest wake-up, at least one second; None where there is none."""
        if not self.wake_ups:
            return None
        return max(min(self.wake_ups) - now, timedelta(seconds=1))


State = Literal["Waiting", "Suspended", "Active", "Failed", "Complete"]
"""Where a run stands after a pass: it waits for its model, is suspended, has a stage at work, or
has ended."""


@dataclass(frozen=True)
class Decision:
    """What a pass has decided about a run."""

    state: State
    actions: Actions
    failure: FailureStatus | None = None
    """Why the run has failed, in state Failed."""
