"""When a stage's Job is recreated, as the run's next revision: its Job controller would never, or
only after minutes, replace a pod.

- A pod on a node that is not reachable terminates for ever, because its kubelet is gone, and a Job
  replaces only pods that have ended. A gang that still makes progress is left alone.
- An elastic gang that can go on without a lost pod does so. After some minutes its Job is recreated
  all the same, so that the pod finds another node, unless the gang would have to queue for that.
- After several failed pods a Job waits longer before it replaces one (10 s, doubled with each) than
  it takes to make a gang.
- A rule of ``failurePolicy`` says so, or the run has failed twice on a node (``retries``).
- No node is found while the gang avoids some.
- The trainer has failed, but another container (an injected sidecar) keeps the pod running.

The next revision has names of its own, so that its pods meet none of the old ones; the attempt
number in HEAD.json fences what the old ones still write.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Final

from finetune_operator.config import (
    AVOIDANCE_HOLDS,
    GANG_SHRINKS,
    LOST_AFTER,
    LOST_ELSEWHERE,
    PODS_REPLACED,
    SIDECAR_ENDS,
)
from finetune_operator.decision.plan import Recreation
from finetune_operator.decision.retries import after_incident, retry
from finetune_operator.decision.run_failure import blocked, failed_stage, run_failure
from finetune_operator.decision.run_view import RunView, gang_runs, is_elastic
from finetune_operator.decision.stages import GANG

FIRST_BACKOFF: Final = timedelta(seconds=10)
"""Delay of the Job controller after the first failed pod; doubled with each further one."""
LONGEST_BACKOFF: Final = timedelta(minutes=10)


def recreation(view: RunView) -> Recreation | None:
    """The next revision of the run that begins in this pass with the same spec; None: none does."""
    if view.spec.suspend or view.job is None or run_failure(view) is not None:
        return None
    cause = failed_stage(view) or blocked(view)
    if cause is not None:
        return retry(view, cause)
    if not view.job.makes_pods:
        return None
    return after_incident(view) or _of_lost_node(view) or _of_strict_placement(view) or _other(view)


def _of_lost_node(view: RunView) -> Recreation | None:
    why = _lost_node(view)
    if why is None:
        return None
    incidents = view.incidents_when_recreated
    elsewhere = after_incident(view, incidents)
    if elsewhere is not None:
        return replace(elsewhere, why=f"{why}; {elsewhere.why}")
    known = incidents.acted("Gang") if incidents.new else incidents
    return Recreation(why, known, avoided=view.avoided_nodes)


def _of_strict_placement(view: RunView) -> Recreation | None:
    """Nodes are avoided only as long as there are others."""
    due = _placement_due(view)
    if due is None or due > view.now:
        return None
    nodes = ", ".join(n.node for n in view.avoided_nodes)
    why = f"the scheduler finds no node while the gang avoids {nodes}, which is used again"
    return Recreation(why, view.incidents)


def _placement_due(view: RunView) -> datetime | None:
    lacking = [p.created for p in view.pods if p.active and p.unschedulable]
    if view.stage != GANG or not view.avoided_nodes or not lacking:
        return None
    if is_elastic(view) and gang_runs(view):
        return None  # it trains with fewer pods
    return min(lacking) + AVOIDANCE_HOLDS


def _other(view: RunView) -> Recreation | None:
    why = _long_backoff(view) or _sidecar(view)
    if why is None:
        return None
    known = view.incidents.acted("Gang") if view.incidents.new else view.incidents
    return Recreation(why, known, avoided=view.avoided_nodes)


def recreate_due(view: RunView) -> datetime | None:
    """When ``recreation`` may change although nothing happens."""
    times = [_lost_at(view)] if view.lost_pods else []
    placement = _placement_due(view)
    times += [placement] if placement else []
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
