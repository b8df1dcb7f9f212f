"""The cost of a run: GPUs times the seconds for which its gang's pods hold them."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from finetune_api.cluster import Compute
from finetune_api.results import Progress, TrainSummary
from finetune_api.status import Usage
from finetune_operator.config import USAGE_STEP_SECONDS
from finetune_operator.status.models import make
from finetune_operator.world.children import JobView
from finetune_operator.world.pods import PodView


def usage(
    before: Usage | None,
    compute: Compute,
    pods: Iterable[PodView],
    job: JobView | None,
    ran_before: bool,
    progress: Progress | None,
    trained: TrainSummary | None,
    now: datetime,
) -> Usage:
    """Usage of a run so far. It never falls: pods that are gone were counted before.

    Args:
        before: usage as stored.
        compute: nodes and GPUs of the run.
        pods: all pods of the gang, including those that are gone.
        job: the gang's Job.
        ran_before: whether the gang has run already, which ends the queued seconds.
        progress, trained: the trainer's own figures. Wall time (during training: the lost part of
            it) is the lower bound, for pods that ended while no operator ran.
        now: end of the charged time of running pods.
    """
    pods = list(pods)
    gpus = compute.effective_min_nodes * compute.gpus_per_node  # of every attempt, at least
    seconds = sum(_gpus_of(p, compute.gpu_resource_name) * _held_seconds(p, now) for p in pods)
    lost = trained.lost_seconds if trained else progress.lost_seconds if progress else 0.0
    wall = trained.training_seconds if trained else lost
    old = before or Usage()
    return make(
        Usage,
        gpu_seconds=max(old.gpu_seconds, int(seconds), int(wall * gpus)),
        wasted_gpu_seconds=max(old.wasted_gpu_seconds, int(lost * gpus)),
        queued_seconds=old.queued_seconds
        if ran_before and before is not None
        else _queued(old, compute, pods, job, now),
    )


def _gpus_of(pod: PodView, resource: str) -> int:
    text = str(pod.limits.get(resource, "0"))
    return int(text) if text.isdigit() else 0


def _charged_until(now: datetime) -> datetime:
    stamp = int(now.timestamp())
    return datetime.fromtimestamp(stamp - stamp % USAGE_STEP_SECONDS, UTC)


def _held_seconds(pod: PodView, now: datetime) -> float:
    if pod.started is None:
        return 0.0
    end = pod.finished or _charged_until(now)
    return max(0.0, (end - pod.started).total_seconds())


def _queued(
    old: Usage, compute: Compute, pods: list[PodView], job: JobView | None, now: datetime
) -> int:
    """Seconds from the Job's creation until enough ranks had started, or until now."""
    if job is None:
        return old.queued_seconds
    first: dict[int, datetime] = {}
    for pod in pods:
        if pod.started is not None:
            first[pod.index] = min(pod.started, first.get(pod.index, pod.started))
    fewest = compute.effective_min_nodes
    end = sorted(first.values())[fewest - 1] if len(first) >= fewest else _charged_until(now)
    return max(old.queued_seconds, int((end - job.created).total_seconds()))
