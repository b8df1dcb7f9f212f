"""The incidents of a run: ends of the gang's work from which it recovers.

Pods that ended since the newest recorded incident either belong to it (same attempt, another
completion index) or are a new one. Status keeps the record, because pods and Jobs are deleted.

Only faults count against ``failurePolicy.maxRestarts``. Kubernetes disrupts pods for reasons that
the run cannot help: drain, preemption, a lost node.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from finetune_api.failures import row_of
from finetune_api.names import FINAL_EXIT_CODES
from finetune_api.status import FailureStatus, FineTuneJobStatus, Incident
from finetune_operator.config import BUDGET_RESTORED_AFTER
from finetune_operator.decision.failures import pod_failure, strongest
from finetune_operator.world.objects import format_time, parse_time
from finetune_operator.world.pods import PodView

KEPT: Final = 10
"""Incidents that status keeps."""
INDEXES_MAX: Final = 1024
MESSAGE_MAX: Final = 500


@dataclass(frozen=True)
class Incidents:
    """The incidents of a run so far."""

    newest_first: tuple[Incident, ...] = ()
    faults: int = 0
    """Faults that count against failurePolicy.maxRestarts."""
    new_fault: bool = False
    """Whether ``faults`` has grown in this pass."""

    @property
    def count(self) -> int:
        """Number of all incidents of the run."""
        return self.newest_first[0].number if self.newest_first else 0


def incidents(
    before: FineTuneJobStatus,
    pods: Iterable[PodView],
    attempt: int,
    checkpoint: str | None,
    gang_created: datetime,
    now: datetime,
    lost: Sequence[PodView] = (),
) -> Incidents:
    """Return the incidents of a run after a look at its pods.

    Args:
        before: the run's stored status.
        pods: the gang's pods, including those that are gone.
        attempt: the run's current attempt.
        checkpoint: the newest checkpoint.
        gang_created: when the gang's Job was created.
        lost: pods on lost nodes that are given up in this pass.
    """
    known, faults = list(before.incidents), before.faults
    if faults and _is_restored(known, checkpoint, now):
        faults = 0
    recorded = parse_time(known[0].end_time) if known else None
    pods = [p for p in pods if is_incident(p) or p in lost]
    ended = [p for p in pods if recorded is None or end_of(p) > recorded]
    new_fault = False
    for pod in sorted(ended, key=end_of):
        joins = bool(known) and _joins(known[0], pod, attempt, gang_created)
        was_fault = joins and known[0].fault
        if joins:
            known[0] = _joined(known[0], pod, pods)
        else:
            known[:1] = [_begun(known, pod, attempt, checkpoint), *_without_indexes(known[:1])]
        if known[0].fault and not was_fault:
            faults, new_fault = faults + 1, True
    return Incidents(tuple(known[:KEPT]), faults, new_fault)


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
    known: Sequence[Incident], pod: PodView, attempt: int, checkpoint: str | None
) -> Incident:
    cause = _cause(pod, attempt)
    return Incident.model_validate(
        {
            "number": known[0].number + 1 if known else 1,
            "startTime": format_time(end_of(pod)),
            "endTime": format_time(end_of(pod)),
            "attempt": attempt,
            "fault": is_fault(pod, cause),
            "failure": cause.to_json(),
            "indexes": [pod.index],
            "checkpoint": checkpoint,
        }
    )


def _cause(pod: PodView, attempt: int) -> FailureStatus:
    cause = pod_failure(pod, attempt or None)
    return cause.model_copy(update={"message": cause.message[:MESSAGE_MAX]})


def _joins(incident: Incident, pod: PodView, attempt: int, gang_created: datetime) -> bool:
    """Whether a pod's end is part of an incident."""
    began = parse_time(incident.start_time)
    same_gang = began is not None and began > gang_created
    return same_gang and incident.attempt == attempt and pod.index not in incident.indexes


def _joined(incident: Incident, pod: PodView, pods: Iterable[PodView]) -> Incident:
    """An incident with one more pod; the cause is that of the pod with the best evidence."""
    named = [p for p in pods if p.name == incident.failure.pod]
    cause = _cause(pod, incident.attempt)
    fault = is_fault(pod, cause)
    explains = strongest([*named, pod]) is pod if named else fault and not incident.fault
    return incident.model_copy(
        update={
            "end_time": format_time(end_of(pod)),
            "fault": incident.fault or fault,
            "failure": cause if explains else incident.failure,
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
