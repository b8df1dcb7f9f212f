"""Time from a run's start to its first optimizer step, by part.

    run starts → gang's Job created → its last pod created → scheduled → started → trainer's parts
            prepare               queue             schedule       pull

Known once the trainer reports its first step; written once per run.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from itertools import pairwise

from finetune_api.results import Startup
from finetune_api.status import StartupStatus
from finetune_operator.status.models import make
from finetune_operator.world.children import JobView
from finetune_operator.world.pods import PodView


def startup(
    began: datetime | None,
    nodes: int,
    job: JobView | None,
    pods: Iterable[PodView],
    reported: Startup | None,
) -> StartupStatus | None:
    """The startup times of a run, or None while they are not known.

    Args:
        began: when the run began.
        nodes: number of pods with which its gang trains, at least.
        job: the gang's Job.
        pods: the gang's pods, of which the last one counts: the gang cannot work without it.
        reported: the trainer's own parts. Those of an attempt that resumed from a checkpoint are
            ignored: the run's first step belongs to an earlier attempt.
    """
    if began is None or reported is None or reported.from_step > 0:
        return None
    moments = [began, job.created if job else None, *_last(nodes, pods)]
    names = ("prepare", "queue", "schedule", "pull")
    parts = {
        name: int((end - start).total_seconds())
        for name, (start, end) in zip(names, pairwise(moments), strict=True)
        if start is not None and end is not None
    }
    parts["total"] = int(reported.first_step - began.timestamp())
    parts |= {name: round(seconds) for name, seconds in reported.seconds.items()}
    # Clocks of nodes may differ slightly: clip negative times.
    return make(StartupStatus, **{f"{name}_seconds": max(0, n) for name, n in parts.items()})


def _last(nodes: int, pods: Iterable[PodView]) -> tuple[datetime | None, ...]:
    """When the last pod was created, scheduled and started, over the newest pod of each rank."""
    newest: dict[int, PodView] = {}
    for pod in sorted((p for p in pods if p.started is not None), key=lambda p: p.created):
        newest[pod.index] = pod
    if len(newest) < nodes:
        return None, None, None
    gang = newest.values()
    scheduled = [p.scheduled_at for p in gang if p.scheduled_at is not None]
    return (
        max(p.created for p in gang),
        max(scheduled) if len(scheduled) == len(newest) else None,
        max(p.started for p in gang if p.started is not None),
    )
