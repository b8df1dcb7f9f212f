"""Obstacles: conditions that keep a stage's pods from running, how long each is tolerated, and the
resulting failure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from finetune_api.status import FailureStatus
from finetune_operator.config import (
    PODS_AWAITED,
    PULL_FAILING,
    PULL_REFUSED,
    START_AWAITED,
)
from finetune_operator.decision.failures import failure
from finetune_operator.decision.stages import GANG
from finetune_operator.world.children import JobView
from finetune_operator.world.pods import PULL_REASONS, PodView

_REFUSED = ("not found", "unauthorized", "denied", "forbidden", "manifest unknown", "not exist")
"""Substrings of the kubelet's message for a pull that the registry refuses."""


@dataclass(frozen=True)
class Obstacle:
    """Something that keeps a pod from running. Status shows it from ``shown_from`` on (None:
    immediately), and at ``until`` the run fails with ``failure``."""

    reason: str
    message: str
    until: datetime
    failure: FailureStatus
    shown_from: datetime | None = None


def obstacle(
    job: JobView,
    pods: Iterable[PodView],
    start_deadline: timedelta,
    awaits_image: bool = False,
    waiting_since: datetime | None = None,
    lacks_pods_since: datetime | None = None,
) -> Obstacle | None:
    """The stage's obstacle that becomes a failure first, or None.

    Args:
        job: the stage's Job.
        pods: its pods.
        start_deadline: counted from the time at which the Job may start, or from the creation of a
            replacement pod. Time in a queue is not counted.
        awaits_image: whether an image that cannot be pulled is waited for until the start deadline:
            the stage's pods have run before, so it is no mistake of the manifest, or by a rule.
        waiting_since: when the gang first waited for nodes, if it has tried before.
        lacks_pods_since: when the Job was first seen to lack pods, if it does.
    """
    since = job.started or job.created
    pods = list(pods)
    found = [
        o
        for o in (_of_pod(p, since, start_deadline, awaits_image, waiting_since) for p in pods)
        if o is not None
    ]
    # The Job of a CPU stage replaces a failed pod after its back-off; a gang's is recreated then.
    replaces = job.role != GANG and any(p.phase == "Failed" for p in pods)
    if job.makes_pods and not replaces and job.missing(pods):
        found.append(_lacks_pods(job, pods, start_deadline, lacks_pods_since or since))
    return min(found, key=lambda o: o.until, default=None)


def _of_pod(
    pod: PodView,
    since: datetime,
    deadline: timedelta,
    awaits_image: bool,
    waiting_since: datetime | None,
) -> Obstacle | None:
    if pod.running or not pod.active:
        return None
    until = max(since, pod.created) + deadline
    if pod.waiting_reason in PULL_REASONS:
        return _image(pod, until if awaits_image else None)
    if pod.waiting_reason == "CreateContainerConfigError":
        return _config(pod, until)
    if not pod.scheduled:
        limit = waiting_since + deadline if waiting_since else until
        return _unschedulable(pod, limit, deadline)
    return _not_started(pod, until, deadline) if pod.is_starting else None


def _image(pod: PodView, until: datetime | None) -> Obstacle:
    """
    Args:
        until: when to give up; None: by the kind of error.
    """
    text = pod.waiting_message
    final = pod.waiting_reason in ("InvalidImageName", "ErrImageNeverPull")
    refused = any(mark in text.lower() for mark in _REFUSED)
    allowed = timedelta(0) if final else PULL_REFUSED if refused else PULL_FAILING
    message = (
        f"image {pod.image!r} cannot be pulled ({pod.waiting_reason}): {text or 'no message'}."
        " Correct spec.compute.image, or name a pull secret in spec.compute.podTemplate.spec"
        ".imagePullSecrets"
    )
    return Obstacle(
        "ImagePull",
        message,
        until or (pod.pull_failing_since or pod.created) + allowed,
        failure(pod.waiting_reason or "ErrImagePull", message, pod),
    )


def _config(pod: PodView, until: datetime) -> Obstacle:
    reason = "MissingSecret" if "secret" in pod.waiting_message.lower() else "ContainerConfig"
    message = (
        f"the container cannot be created: {pod.waiting_message}. It starts as soon as this"
        " is fixed: create the Secret that spec.storage.secretRef names, with the keys"
        " AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (of spec.evaluation.judge: with API_KEY)"
    )
    return Obstacle(reason, message, until, failure(reason, message, pod))


def _unschedulable(pod: PodView, until: datetime, deadline: timedelta) -> Obstacle:
    why = pod.unschedulable or "the scheduler has not looked at it yet"
    what = f"the gang's PodGroup {pod.pod_group}" if pod.pod_group else f"pod {pod.name}"
    shown = f"no node for {what}: {why}"
    less = "fewer compute.nodes or gpusPerNode, smaller compute.resources"
    if pod.role != GANG:
        less = "fewer prepare.workers, smaller prepare.resources"
    message = (
        f"{shown}. Waited {int(deadline.total_seconds())} s"
        f" (scheduling.startDeadlineSeconds). Request {less}, or add nodes"
    )
    return Obstacle(
        "Unschedulable",
        shown,
        until,
        failure("Unschedulable", message, pod),
        shown_from=None if pod.unschedulable else pod.created + START_AWAITED,
    )


def _not_started(pod: PodView, until: datetime, deadline: timedelta) -> Obstacle:
    why = pod.waiting_message or pod.warning
    reason = pod.waiting_reason or "ContainerCreating"
    shown = (
        f"pod {pod.name} does not start yet on node {pod.node} ({reason}):"
        f" {why or 'its image is pulled, or a volume is mounted'}"
    )
    message = (
        f"{shown}. Waited {int(deadline.total_seconds())} s (scheduling.startDeadlineSeconds); see"
        f" `kubectl describe pod {pod.name}`"
    )
    begun = pod.scheduled_at or pod.created
    return Obstacle(
        "NotStarted",
        shown,
        until,
        failure("NotStarted", message, pod),
        shown_from=None if why else begun + START_AWAITED,
    )


def _lacks_pods(
    job: JobView, pods: Sequence[PodView], deadline: timedelta, since: datetime
) -> Obstacle:
    """The Job controller has not made all pods, or not replaced one after its back-off."""
    there = job.parallelism - len(job.missing(pods))
    why = job.warning or (
        "if this persists, a quota or an admission policy refuses them: see"
        f" `kubectl describe job {job.name}`"
    )
    message = f"{there} of {job.parallelism} pods of Job {job.name} exist: {why}"
    return Obstacle(
        "PodsNotCreated",
        message,
        since + deadline,
        failure("PodsNotCreated", message),
        shown_from=since if job.warning else since + PODS_AWAITED,
    )
