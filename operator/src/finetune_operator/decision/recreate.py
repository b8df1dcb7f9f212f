"""When a stage's Job is recreated, as the run's next revision: its Job controller would never, or
only after minutes, replace a pod.

- A pod on a node that is not reachable terminates for ever, because its kubelet is gone, and a Job
  replaces only pods that have ended. A gang that still makes progress is left alone.
- An elastic gang that can go on without a lost pod does so. After some minutes its Job is recreated
  all the same, so that the pod finds another node, unless the gang would have to queue for that.
- After several failed pods a Job waits longer before it replaces one (10 s, doubled with each) than
  it takes to make a gang.
- The trainer has failed, but another container (an injected sidecar) keeps the pod running.

The next revision has names of its own, so that its pods meet none of the old ones; the attempt
number in HEAD.json fences what the old ones still write.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

from finetune_operator.config import (
    GANG_SHRINKS,
    LOST_AFTER,
    LOST_ELSEWHERE,
    PODS_REPLACED,
    SIDECAR_ENDS,
)
from finetune_operator.decision.run_view import RunView, gang_runs, is_elastic
from finetune_operator.decision.stages import GANG

FIRST_BACKOFF: Final = timedelta(seconds=10)
"""Delay of the Job controller after the first failed pod; doubled with each further one."""
LONGEST_BACKOFF: Final = timedelta(minutes=10)


def recreate_reason(view: RunView) -> str | None:
    """Why the stage's Job is recreated in this pass; None: it is not."""
    job = view.job
    if job is None or not job.makes_pods or view.spec.suspend:
        return None
    return _lost_node(view) or _long_backoff(view) or _sidecar(view)


def recreate_due(view: RunView) -> datetime | None:
    """When ``recreate_reason`` may change although nothing happens."""
    times = [_lost_at(view)] if view.lost_pods else []
    times += [p.finished + SIDECAR_ENDS for p in view.pods if p.only_sidecars_run and p.finished]
    return min((time for time in times if time > view.now), default=None)


def _lost_node(view: RunView) -> str | None:
    if not view.lost_pods or view.now < _lost_at(view):
        return None
    pod = view.lost_pods[0]
    if view.now < _stuck_at(view):
        return f"node {pod.node} is still not reachable: pod {pod.name} moves to another node"
    return f"node {pod.node} is not reachable, and pod {pod.name} makes no progress"


def _lost_at(view: RunView) -> datetime:
    """When a stage with lost pods is recreated."""
    if is_elastic(view) and gang_runs(view) and view.queue is None:
        return min(_stuck_at(view), _lost_since(view) + LOST_ELSEWHERE)
    return _stuck_at(view)


def _stuck_at(view: RunView) -> datetime:
    """When a stage with lost pods counts as lost, unless it makes progress."""
    since = _lost_since(view)
    seen = view.observed.progress_time if view.stage == GANG and view.progress else None
    awaited = GANG_SHRINKS if is_elastic(view) and gang_runs(view) else LOST_AFTER
    return max(since, seen or since) + awaited


def _lost_since(view: RunView) -> datetime:
    return min(p.disrupted_at or view.now for p in view.lost_pods)


def _long_backoff(view: RunView) -> str | None:
    failed = [p for p in view.pods if p.phase == "Failed"]
    alive = {p.index for p in view.pods if p.active}
    missing = {p.index for p in failed} - alive
    if view.stage != GANG or not missing or (is_elastic(view) and gang_runs(view)):
        return None
    backoff = min(FIRST_BACKOFF * 2 ** min(len(failed) - 1, 10), LONGEST_BACKOFF)
    if backoff <= PODS_REPLACED:
        return None
    return (
        f"the Job would replace pod {min(missing)} only after {int(backoff.total_seconds())} s, as"
        f" {len(failed)} pods have failed"
    )


def _sidecar(view: RunView) -> str | None:
    if view.stage != GANG:  # fails the run: ``RunView.failed_beside_sidecar``
        return None
    for pod in view.pods:
        if view.outlasted(pod) and pod.exit_code != 0:
            return f"the trainer of pod {pod.name} has ended, but another container still runs"
    return None
