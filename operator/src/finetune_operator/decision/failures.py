"""Why a stage failed, read from its pods: from a container's termination message, else from what
Kubernetes reports of the pod, else from the exit code."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any, Final

from finetune_api.names import FINAL_EXIT_CODES, ExitCode, FailureClass
from finetune_api.status import FailureStatus
from finetune_operator.world.children import JobView
from finetune_operator.world.pods import PodView

MESSAGE_MAX: Final = 4000
_TOGETHER: Final = timedelta(minutes=2)
"""Pods that ended within this time of the last one may have the same cause: yesterday's
out-of-memory kill does not explain today's failure."""
_LOST_NODE: Final = ("Taint", "Node", "PodGC", "Admission")
"""Parts of Kubernetes' reasons for pods of a node that was lost, or that could not run them; other
reasons are a preemption or an eviction."""

BY_EXIT_CODE: Final[dict[int, tuple[FailureClass, str]]] = {
    ExitCode.USER_ERROR: ("UserError", "the manifest is invalid or cannot be satisfied"),
    ExitCode.DATA_ERROR: ("DataError", "a record of the data cannot be used"),
    ExitCode.STORAGE_DENIED: ("Storage", "object storage refuses access"),
    ExitCode.DIVERGED: ("Diverged", "the loss is not finite, or spikes"),
    ExitCode.OUT_OF_MEMORY: ("OutOfMemory", "the device is out of memory"),
    ExitCode.INTERNAL: ("Internal", "the trainer has found a defect of its own"),
    ExitCode.FENCED: ("Internal", "a newer attempt has taken over the run"),
    ExitCode.NODE_FAILURE: ("NodeFailure", "another process of the gang, or a device, was lost"),
    ExitCode.STORAGE_UNAVAILABLE: ("Storage", "object storage could not be reached"),
    ExitCode.UNEXPECTED: ("Internal", "the trainer failed with an unexpected error"),
    ExitCode.STALLED: ("Stalled", "a training process made no progress"),
    ExitCode.INTERRUPTED: ("Preempted", "stopped on request, with its state saved"),
}
"""Class and message for a container that left only an exit code."""


def failure(
    failure_class: str, reason: str, message: str, pod: PodView | None = None, **more: Any
) -> FailureStatus:
    """Build a FailureStatus; the message is cut to the maximum length in status."""
    raw = {"class": failure_class, "reason": reason, "message": message[:MESSAGE_MAX], **more}
    if pod is not None:
        raw |= {"pod": pod.name, "node": pod.node, "exitCode": pod.exit_code}
    return FailureStatus.model_validate({k: v for k, v in raw.items() if v is not None})


def stage_failure(
    job: JobView | None, pods: Iterable[PodView], attempt: int | None
) -> FailureStatus:
    """Return the failure of the pod with the best evidence among those that ended last; without
    failed pods, the Job controller's reason."""
    failed = [p for p in pods if p.phase == "Failed" or p.exit_code not in (None, 0)]
    if not failed:
        reason = (job.failure_reason if job else "") or "PodsGone"
        message = (
            job.failure_message if job else ""
        ) or "its pods are gone and left no termination message"
        return failure("Internal", reason, f"{message}. The pods' logs may show the cause")
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
        return failure(kind, reason, message, pod, attempt=attempt)
    if pod.exit_reason == "OOMKilled":
        message = _out_of_memory(pod)
        return failure("OutOfMemory", "HostOutOfMemory", message, pod, attempt=attempt)
    if pod.disruption or pod.reason:
        reason = pod.disruption or pod.reason
        lost = any(word in reason for word in _LOST_NODE)
        kind = "NodeFailure" if lost else "Preempted"
        message = f"Kubernetes took the pod away ({reason}): {pod.message or 'no message'}"
        return failure(kind, reason, message, pod, attempt=attempt)
    if pod.deleted_by is not None or pod.exit_code is None:
        message = "the pod was deleted while it ran"
        return failure("Preempted", "PodDeleted", message, pod, attempt=attempt)
    if pod.exit_code in BY_EXIT_CODE:
        kind, text = BY_EXIT_CODE[pod.exit_code]
        message = f"{text}; the container left no message: see `kubectl logs {pod.name}`"
        return failure(kind, ExitCode(pod.exit_code).name.title().replace("_", ""), message, pod)
    left = f": {pod.exit_text[:1000]}" if pod.exit_text else " and left no message"
    message = (
        f"the container ended with exit code {pod.exit_code}"
        f" ({pod.exit_reason or 'no reason'}){left}; see `kubectl logs {pod.name}`"
    )
    return failure("Internal", "ContainerFailed", message, pod, attempt=attempt)


def _out_of_memory(pod: PodView) -> str:
    return (
        "the kernel killed the container for its memory (limit:"
        f" {pod.limits.get('memory', 'none set')}). Raise compute.resources.limits.memory"
        " (prepare.resources for prepare and publish), lower training.microBatchTokens or, if it"
        " died while it was saving, set checkpoint.staging: Disk"
    )
