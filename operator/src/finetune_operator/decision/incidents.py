"""The incidents of a run: ends of the gang's work from which it recovers.

Pods that ended since the newest recorded incident either belong to it (same attempt, another
completion index) or are a new one. Status keeps the record, because pods and Jobs are deleted.

Only faults count against ``failurePolicy.maxRestarts``. Kubernetes disrupts pods for reasons that
the run cannot help: drain, preemption, a lost node.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

from finetune_api.cluster import FailureRule
from finetune_api.failures import Action, row_of
from finetune_api.names import FINAL_EXIT_CODES
from finetune_api.results import Progress
from finetune_api.status import FailureStatus, Incident
from finetune_operator.config import BUDGET_RESTORED_AFTER
from finetune_operator.decision.failures import by_rule, pod_failure, strongest
from finetune_operator.world.objects import format_time, parse_time
from finetune_operator.world.pods import PodView

KEPT: Final = 10
"""Incidents that status keeps."""
INDEXES_MAX: Final = 1024
MESSAGE_MAX: Final = 500


@dataclass(frozen=True)
class Place:
    """How far a run has come."""

    attempt: int
    step: int | None
    checkpoint: str | None


@dataclass(frozen=True)
class Incidents:
    """The incidents of a run so far."""

    newest_first: tuple[Incident, ...] = ()
    faults: int = 0
    """Faults that count against failurePolicy.maxRestarts."""
    new_fault: bool = False
    """Whether ``faults`` has grown in this pass."""
    new: Incident | None = None
    """The newest incident, if it has begun or got another cause in this pass."""

    @property
    def count(self) -> int:
        """Number of all incidents of the run."""
        return self.newest_first[0].number if self.newest_first else 0

    def acted(self, action: Action, cause: FailureStatus | None = None) -> Incidents:
        """With what was done after the newest incident, and what else is known of its cause."""
        update = {"action": action} | ({"failure": cause} if cause else {})
        newest = self.newest_first[0].model_copy(update=update)
        return replace(self, newest_first=(newest, *self.newest_first[1:]), new=newest)

    def with_failure(
        self, cause: FailureStatus, action: Action, place: Place, now: datetime
    ) -> Incidents:
        """With a failure that would have ended the run, but for a rule."""
        fault = action != "Wait"
        newest = _incident(self.newest_first, cause, action, fault, now, place)
        known = (newest, *_without_indexes(self.newest_first))[:KEPT]
        return Incidents(known, self.faults + fault, fault, newest)


def recovered(known: Incidents, progress: Progress | None) -> Incidents:
    """With the time to recover of the newest incident, once the next attempt has made a step."""
    newest = known.newest_first[0] if known.newest_first else None
    began = parse_time(newest.start_time) if newest else None
    if newest is None or began is None or newest.recovery_seconds is not None:
        return known
    if progress is None or progress.startup is None or progress.attempt <= newest.attempt:
        return known
    # A clock of a node may be wrong, and its time too large for a date.
    seconds = progress.startup.first_step - began.timestamp()
    update = {"recovery_seconds": max(0, min(int(seconds), 2**31 - 1))}
    first = newest.model_copy(update=update)
    return replace(known, newest_first=(first, *known.newest_first[1:]))


def incidents(
    before: Incidents,
    pods: Iterable[PodView],
    place: Place,
    rules: Sequence[FailureRule],
    gang_created: datetime,
    now: datetime,
    lost: Sequence[PodView] = (),
) -> Incidents:
    """Return the incidents of a run after a look at its pods.

    Args:
        before: those in the run's stored status.
        pods: the gang's pods, including those that are gone.
        rules: failurePolicy.rules.
        gang_created: when the gang's Job was created.
        lost: pods on lost nodes that are given up in this pass.
    """
    known, faults = list(before.newest_first), before.faults
    if faults and _is_restored(known, place.checkpoint, now):
        faults = 0
    recorded = parse_time(known[0].end_time) if known else None
    pods = [p for p in pods if is_incident(p) or p in lost]
    ended = [p for p in pods if recorded is None or end_of(p) > recorded]
    new_fault = False
    for pod in sorted(ended, key=end_of):
        joins = bool(known) and _joins(known[0], pod, place.attempt, gang_created)
        was_fault = joins and known[0].fault
        if joins:
            known[0] = _joined(known[0], pod, pods, rules)
        else:
            known[:1] = [_begun(known, pod, place, rules), *_without_indexes(known[:1])]
        if known[0].fault and not was_fault:
            faults, new_fault = faults + 1, True
    return Incidents(tuple(known[:KEPT]), faults, new_fault, _new(before, known))


def _new(before: Incidents, known: Sequence[Incident]) -> Incident | None:
    if not known:
        return None
    old = before.newest_first[0] if before.newest_first else None
    same = old is not None and (old.number, old.failure) == (known[0].number, known[0].failure)
    return None if same else known[0]


def is_incident(pod: PodView) -> bool:
    """Whether a pod's end interrupts the gang. Not so are a fenced pod, and a pod with a final
    failure, after which nothing is restarted."""
    if pod.exit_code in FINAL_EXIT_CODES or pod.phase == "Succeeded" or pod.exit_code == 0:
        return False
    return pod.phase == "Failed" or pod.exit_code is not None


def is_fault(pod: PodView, cause: FailureStatus) -> bool:
    """Whether a pod's end counts as a fault, by its cause. The end of a pod that was to be deleted
    is no fault, whatever its processes said meanwhile; an eviction for what the pod itself used is
    one."""
    row = row_of(cause.reason, pod.exit_code)
    asked = pod.deleted_by is not None or pod.is_disrupted
    return not asked and (row is None or row.counts)


def end_of(pod: PodView) -> datetime:
    """When a pod ended, as far as is known."""
    return pod.finished or pod.disrupted_at or pod.created


def _begun(
    known: Sequence[Incident], pod: PodView, place: Place, rules: Sequence[FailureRule]
) -> Incident:
    cause = _cause(pod, place.attempt)
    action = by_rule(rules, cause) or "Pod"
    fault = is_fault(pod, cause) and action != "Wait"
    incident = _incident(known, cause, action, fault, end_of(pod), place)
    return incident.model_copy(update={"indexes": [pod.index]})


def _incident(
    known: Sequence[Incident],
    cause: FailureStatus,
    action: Action,
    fault: bool,
    time: datetime,
    place: Place,
) -> Incident:
    raw: dict[str, Any] = {
        "number": known[0].number + 1 if known else 1,
        "startTime": format_time(time),
        "endTime": format_time(time),
        "attempt": place.attempt,
        "fault": fault,
        "failure": _short(cause).to_json(),
        "action": action,
        "step": place.step,
        "checkpoint": place.checkpoint,
    }
    return Incident.model_validate(raw)


def _cause(pod: PodView, attempt: int) -> FailureStatus:
    return _short(pod_failure(pod, attempt or None))


def _short(cause: FailureStatus) -> FailureStatus:
    return cause.model_copy(update={"message": cause.message[:MESSAGE_MAX]})


def _joins(incident: Incident, pod: PodView, attempt: int, gang_created: datetime) -> bool:
    """Whether a pod's end is part of an incident."""
    began = parse_time(incident.start_time)
    same_gang = began is not None and began > gang_created
    return same_gang and incident.attempt == attempt and pod.index not in incident.indexes


def _joined(
    incident: Incident, pod: PodView, pods: Iterable[PodView], rules: Sequence[FailureRule]
) -> Incident:
    """An incident with one more pod; the cause is that of the pod with the best evidence."""
    named = [p for p in pods if p.name == incident.failure.pod]
    cause = _cause(pod, incident.attempt)
    fault = is_fault(pod, cause)
    explains = strongest([*named, pod]) is pod if named else fault and not incident.fault
    action = by_rule(rules, cause) or "Pod" if explains else incident.action
    return incident.model_copy(
        update={
            "end_time": format_time(end_of(pod)),
            "fault": incident.fault or (fault and action != "Wait"),
            "failure": cause if explains else incident.failure,
            "action": action,
            "indexes": [*incident.indexes, pod.index][:INDEXES_MAX],
        }
    )


def _without_indexes(known: Sequence[Incident]) -> list[Incident]:
    return [incident.model_copy(update={"indexes": []}) for incident in known]


def _is_restored(known: Sequence[Incident], checkpoint: str | None, now: datetime) -> bool:
    """Whether the run has trained long enough since its last fault, and saved a checkpoint."""
    last = next((incident for incident in known if incident.fault), None)
    ended = parse_time(last.end_time) if last else None
    if last is None or ended is None:
        return False
    return checkpoint not in (None, last.checkpoint) and now - ended >= BUDGET_RESTORED_AFTER
