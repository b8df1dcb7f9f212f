"""What ``decide`` answers: everything one pass will do, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

from finetune_api.names import Role
from finetune_api.order import RunOrder
from finetune_operator.world.references import Wait


@dataclass(frozen=True)
class Subject:
    """The FineTuneJob a plan is for."""

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
    order: RunOrder
    image: str
    restarts_before: int = 0
    outcome: str | None = None
    """Complete or Failed once it has ended."""
    recorded: bool = False
    """Whether its order is in the cluster already."""
    wait: Wait | None = None
    """Why it cannot begin yet: its order is not complete, and nothing is made of it."""


Kind = Literal["ConfigMap", "Service", "Job", "Pod"]


@dataclass(frozen=True)
class Create:
    """A child to make: the order, the Service or Job of a role. Existing ones are never touched."""

    kind: Kind
    role: Role | None = None


@dataclass(frozen=True)
class Change:
    """A change of a child that exists: suspend, stop, or note how the run ended."""

    kind: Kind
    name: str
    patch: dict[str, Any]


@dataclass(frozen=True)
class Delete:
    """A child to delete, its pods after it with their grace period."""

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
    """One pass: deletions, then creations and changes, then the status, then events."""

    subject: Subject
    run: CurrentRun | None = None
    delete: tuple[Delete, ...] = ()
    create: tuple[Create, ...] = ()
    change: tuple[Change, ...] = ()
    status: dict[str, Any] | None = None
    """The whole new status, or None where it stays."""
    events: tuple[Event, ...] = ()
    look_again: timedelta | None = None
    """When to decide again though nothing was observed."""


@dataclass
class Draft:
    """A plan in the making."""

    delete: list[Delete] = field(default_factory=list)
    create: list[Create] = field(default_factory=list)
    change: list[Change] = field(default_factory=list)
    deadlines: list[datetime] = field(default_factory=list)

    def look_at(self, time: datetime) -> None:
        """Decide again at that time."""
        self.deadlines.append(time)

    def look_again(self, now: datetime) -> timedelta | None:
        """Time to the nearest deadline, at least one second."""
        if not self.deadlines:
            return None
        return max(min(self.deadlines) - now, timedelta(seconds=1))
