"""A gang without a queue of which only some pods find nodes: it gives its nodes back after a while,
waits, and tries again.

Two gangs that each hold some of the nodes which the other needs would otherwise wait for each other
until both fail. The pause grows with each try and differs between jobs, so that one of them finds
all nodes free. This does not happen with a Kueue queue, which admits whole gangs, and in clusters
with gang scheduling, where the scheduler places a gang's PodGroup as a whole.
"""

from __future__ import annotations

import hashlib
from datetime import datetime, timedelta
from typing import Final

from finetune_api.status import FailureStatus, QueueStatus
from finetune_operator.config import PARTIAL_GANG_HOLDS
from finetune_operator.decision.failures import failure
from finetune_operator.decision.run_view import RunView, gang_runs, suffices
from finetune_operator.decision.stages import GANG
from finetune_operator.world.objects import format_time, parse_time
from finetune_operator.world.pods import PodView

FIRST_PAUSE: Final = timedelta(minutes=1)
"""Mean pause after the first release; doubled with each further one, up to ``LONGEST_PAUSE``."""
LONGEST_PAUSE: Final = timedelta(minutes=8)


def release(view: RunView) -> QueueStatus | None:
    """The wait that begins if the gang gives its nodes back in this pass; None: it does not."""
    due = release_due(view)
    job, stored = view.job, view.queue_wait
    if job is None or due is None or due > view.now:
        return None
    again = parse_time(stored.next_try_time) if stored else None
    if again is not None and again > view.now:
        return stored  # released before, but the Job is still there
    tries = (stored.tries if stored else 0) + 1
    why = next((p.unschedulable for p in _lacking(view) if p.unschedulable), "no node yet")
    return QueueStatus.model_validate(
        {
            "since": stored.since if stored else format_time(job.started or job.created),
            "tries": tries,
            "nextTryTime": format_time(view.now + pause(view.subject.uid, tries)),
            "message": f"only some pods of the gang have nodes: {why}"[:1024],
        }
    )


def release_due(view: RunView) -> datetime | None:
    """When the gang gives its nodes back, unless its other pods find nodes; None: it does not."""
    job = view.job
    if view.stage != GANG or view.queue is not None or job is None or not job.makes_pods:
        return None
    lacking = _lacking(view)
    holding = [p.scheduled_at or p.created for p in view.pods if _holds(p)]
    if not lacking or not holding or suffices(view, {p.index for p in view.pods if _holds(p)}):
        return None
    return max([min(holding), *(p.created for p in lacking)]) + PARTIAL_GANG_HOLDS


def _holds(pod: PodView) -> bool:
    return pod.active and pod.scheduled


def _lacking(view: RunView) -> list[PodView]:
    """Pods without a node."""
    return [p for p in view.pods if p.active and not p.scheduled]


def pause(uid: str, tries: int) -> timedelta:
    """Pause before the next try: 0.5 to 1.5 times its mean, the same in every pass."""
    mean = min(FIRST_PAUSE * 2 ** min(tries - 1, 10), LONGEST_PAUSE)
    digest = hashlib.blake2b(f"{uid} {tries}".encode(), digest_size=4).digest()
    seconds: timedelta = mean * (0.5 + int.from_bytes(digest, "big") / 2**32)
    return seconds


def next_try(view: RunView) -> datetime | None:
    """When the stage that has given its nodes back tries again; None: now, or there is none."""
    wait = view.queue_wait
    if view.job is not None or wait is None:
        return None
    due = parse_time(wait.next_try_time)
    return due if due is not None and due > view.now else None


def waits_for_nodes(view: RunView) -> bool:
    """Whether a gang that has given its nodes back before still lacks some."""
    wait = view.queue_wait
    return wait is not None and wait.reason == "Unschedulable" and not gang_runs(view)


def give_up(view: RunView) -> FailureStatus | None:
    """The failure of a gang that has found no nodes by its start deadline, while it pauses."""
    wait, seconds = view.queue_wait, view.spec.scheduling.start_deadline_seconds
    since = parse_time(wait.since) if wait else None
    if wait is None or since is None or view.stage != GANG or view.job is not None:
        return None
    if wait.reason != "Unschedulable":  # the next failure decides (``retries``)
        return None
    if view.now < since + timedelta(seconds=seconds):
        return None
    text = (
        f"{wait.message}. Tried {wait.tries} times in {seconds} s"
        " (scheduling.startDeadlineSeconds). Request fewer compute.nodes or gpusPerNode, or add"
        " nodes"
    )
    return failure("Unschedulable", text)
