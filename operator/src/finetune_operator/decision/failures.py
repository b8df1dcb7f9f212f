"""Why a stage failed, read from its pods: from a container's termination message, else from what
Kubernetes reports of the pod, else from the exit code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Final

from finetune_api.cluster import FailureRule
from finetune_api.failures import BY_EXIT_CODE, ROWS, Action
from finetune_api.names import FINAL_EXIT_CODES, ExitCode
from finetune_api.status import FailureStatus
from finetune_operator.world.children import JobView
from finetune_operator.world.pods import PodView

MESSAGE_MAX: Final = 4000
_TOGETHER: Final = timedelta(minutes=2)
"""Pods that ended within this time of the last one may have the same cause: yesterday's
out-of-memory kill does not explain today's failure."""


def failure(
    reason: str, message: str, pod: PodView | None = None, attempt: int | None = None
) -> FailureStatus:
    """Build the FailureStatus of a reason of the table of failures; the message is cut to the
    maximum length in status."""
    return _status(ROWS[reason].failure_class, reason, message, pod, attempt)


def _status(
    failure_class: str, reason: str, message: str, pod: PodView | None, attempt: int | None
) -> FailureStatus:
    raw = {
        "class": failure_class, "reason": reason, "message": message[:MESSAGE_MAX],
        "attempt": attempt,
    }  # fmt: skip
    if pod is not None:
        raw |= {"pod": pod.name, "node": pod.node, "exitCode": pod.exit_code}
    return FailureStatus.model_validate({k: v for k, v in raw.items() if v is not None})


def by_rule(rules: Sequence[FailureRule], cause: FailureStatus) -> Action | None:
    """What failurePolicy.rules says is done after a failure; None: what the table says."""
    for rule in rules:
        if rule.failure_class == cause.failure_class and rule.reason in (None, cause.reason):
            return rule.action
    return None


def stage_failure(
    job: JobView | None, pods: Iterable[PodView], attempt: int | None
) -> FailureStatus:
    """Return the failure of the pod with the best evidence among those that ended last; without
    failed pods, the Job controller's reason."""
    failed = [p for p in pods if p.phase == "Failed" or p.exit_code not in (None, 0)]
    if not failed:
        reason = job.failure_reason if job else ""
        message = (
            job.failure_message if job else ""
        ) or "its pods are gone and left no termination message"
        text = f"{message}. The pods' logs may show the cause"
        return failure(reason if reason in ROWS else "PodsGone", text)
    last = max(p.finished or p.created for p in failed)
    recent = [p for p in failed if (p.finished or p.created) >= last - _TOGETHER]
    return pod_failure(strongest(recent), attempt)


def strongest(failed: Iterable[PodView]) -> PodView:
    """Return the failed pod with the best evidence, among equals the one that failed last."""
    return max(failed, key=lambda p: (_evidence(p), p.finished or p.created))


def _evidence(pod: PodView) -> int:
    """Rank the evidence of a failed pod from 1 (worst) to 5: a cause of its own ranks above lost
    peers, and a pod that was stopped ranks lowest."""
    code = pod.exit_code
    if code in FINAL_EXIT_CODES:
        return 1 if code == ExitCode.FENCED else 5
    if pod.exit_reason == "OOMKilled":
        return 4
    if pod.termination is not None and pod.termination.failure is not None:
        lost_only = pod.termination.failure.failure_class in ("NodeFailure", "Preempted")
        return 2 if lost_only else 3
    return 1 if code == ExitCode.INTERRUPTED else 2


def pod_failure(pod: PodView, attempt: int | None) -> FailureStatus:
    """Return the failure of a pod."""
    reported = pod.termination.failure if pod.termination else None
    if reported is not None:
        kind, reason, message = reported.failure_class, reported.reason, reported.message
        return _status(kind, reason, message, pod, attempt)
    if pod.exit_reason == "OOMKilled":
        return failure("HostOutOfMemory", _out_of_memory(pod), pod, attempt)
    if pod.disruption or pod.reason:
        message = (
            f"Kubernetes took the pod away ({pod.disruption or pod.reason}):"
            f" {pod.message or 'no message'}"
        )
        return failure(_kubernetes_reason(pod), message, pod, attempt)
    if pod.deleted_by is not None or pod.exit_code is None:
        return failure("PodDeleted", "the pod was deleted while it ran", pod, attempt)
    row = BY_EXIT_CODE.get(pod.exit_code)
    if row is not None:
        text = f"{row.what}; the container left no message"
        return failure(row.reasons[0], f"{text}: see `kubectl logs {pod.name}`", pod)
    left = f": {pod.exit_text[:1000]}" if pod.exit_text else " and left no message"
    message = (
        f"the container ended with exit code {pod.exit_code}"
        f" ({pod.exit_reason or 'no reason'}){left}; see `kubectl logs {pod.name}`"
    )
    return failure("ContainerFailed", message, pod, attempt)


def _kubernetes_reason(pod: PodView) -> str:
    """The reason that Kubernetes gives for taking a pod away. Condition DisruptionTarget has one
    for all that the kubelet does; the pod's own reason tells more."""
    if pod.reason in ROWS:
        return pod.reason
    if pod.disruption is None:
        return "PodRejected"
    return pod.disruption if pod.disruption in ROWS else "Disrupted"


def _out_of_memory(pod: PodView) -> str:
    return (
        "the kernel killed the container for its memory (limit:"
        f" {pod.limits.get('memory', 'none set')}). Raise compute.resources.limits.memory"
        " (prepare.resources for prepare and publish), lower training.microBatchTokens or, if it"
        " died while it was saving, set checkpoint.staging: Disk"
    )
