"""The activity of a run with a stage at work: phase, reason and message.

``BEGINS`` and ``WORKS`` have an entry per stage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from finetune_api.names import Phase, Role
from finetune_operator.decision.failures import stage_failure
from finetune_operator.decision.partial_gang import next_try
from finetune_operator.decision.plan import Decision
from finetune_operator.decision.run_view import (
    RunView,
    gang_runs,
    is_elastic,
    running_indexes,
)
from finetune_operator.world.objects import format_time


class Activity(NamedTuple):
    """The activity of a stage, as phase and conditions show it."""

    phase: Phase
    reason: str
    message: str


def activity(view: RunView, decision: Decision) -> Activity:
    """The activity of the current stage, or what blocks it."""
    stage, obstacle = view.stage, view.obstacle
    assert stage is not None
    begins = BEGINS[stage]
    if view.refusal is not None:
        text = f"retried until the API server accepts it: {view.refusal.message}"
        return Activity(begins, "ChildRefused", text)
    makes = any(c.kind == "Job" for c in decision.actions.create)
    if view.job is None and not makes and next_try(view) is None:
        text = f"waiting for pods of an earlier Job to end; then the Job of {stage} is created"
        return Activity(begins, "Pending", text)
    if obstacle is not None and (obstacle.shown_from is None or obstacle.shown_from <= view.now):
        return Activity(begins, obstacle.reason, obstacle.message)
    again = next_try(view)
    if again is not None and view.queue_wait is not None:
        text = f"{view.queue_wait.message}; its nodes are given back until {format_time(again)}"
        return Activity("Queued", view.queue_wait.reason, text)
    return WORKS[stage](view)


def _map(view: RunView) -> Activity:
    running, workers = len(running_indexes(view)), view.run_spec.spec.prepare.workers
    text = f"access check, split, rendering, tokenizing; {running} of {workers} workers run"
    phase: Phase = "Preparing" if _begun(view) else "Pending"
    return Activity(phase, "Preparing", text + _earlier_tries(view))


def _prepare(view: RunView) -> Activity:
    phase: Phase = "Preparing" if _begun(view) else "Pending"
    text = "access check, split, rendering, tokenizing"
    if view.run_spec.spec.prepare.workers > 1:
        phase = "Preparing"
        text = "duplicates, contamination, index and report; all workers have mapped their shares"
    return Activity(phase, "Preparing", text + _earlier_tries(view))


def _train(view: RunView) -> Activity:
    job, nodes = view.job, view.run_spec.spec.compute.nodes
    if view.queue is not None and (job is None or job.suspended):
        words = f": {job.warning}" if job is not None and job.warning else ""
        return Activity("Queued", "Queued", f"waiting in queue {view.queue}{words}")
    if job is not None and job.suspended:
        return Activity("Queued", "Queued", "the Job is suspended, but not by this operator")
    elastic = is_elastic(view)
    alive = sum(1 for p in view.pods if p.running and not (elastic and p.on_lost_node))
    text = f"{alive} of {nodes} pods run"
    if view.lost_pods:
        lost = ", ".join(sorted({p.node or "?" for p in view.lost_pods}))
        text += f"; node {lost} is not reachable"
        text += "" if elastic else ": without progress, the gang is recreated"
    if any(p.exit_code == 0 for p in view.pods):
        return Activity(_at_work(view), "GangRunning", "the gang has finished, its pods end")
    if not gang_runs(view):
        return Activity("Starting", "Starting", text)
    text += _reduced(view)
    loading = view.progress is not None and view.progress.stage == "Loading"
    return Activity("Starting" if loading else _at_work(view), "GangRunning", text)


def _at_work(view: RunView) -> Phase:
    """Phase of a gang at work."""
    return "Training" if view.run_spec.spec.method.kind.trains else "Evaluating"


def _begun(view: RunView) -> bool:
    """Whether a pod of the stage runs, or is done."""
    return any(p.running or p.exit_code == 0 for p in view.pods)


def _reduced(view: RunView) -> str:
    """Message about an elastic gang that lacks nodes, or takes one in."""
    compute, progress = view.run_spec.spec.compute, view.progress
    trains = progress.nodes if progress else None
    if not is_elastic(view) or trains is None or trains >= compute.nodes:
        return ""
    text = f"; {trains} of {compute.nodes} nodes train (compute.minNodes is {compute.min_nodes})"
    why = next((p.unschedulable for p in view.pods if p.active and p.unschedulable), None)
    return text + (f": {why}" if why else "")


def _publish(view: RunView) -> Activity:
    model = "the model, its " if view.run_spec.spec.method.kind.trains else ""
    text = f"writing {model}metrics and report"
    return Activity("Publishing", "Publishing", text + _earlier_tries(view))


BEGINS: Final[dict[Role, Phase]] = {
    "map": "Pending",
    "prepare": "Pending",
    "train": "Starting",
    "publish": "Publishing",
}
"""Phase of a stage that has no Job, or whose pods cannot run."""

WORKS: Final[dict[Role, Callable[[RunView], Activity]]] = {
    "map": _map,
    "prepare": _prepare,
    "train": _train,
    "publish": _publish,
}
"""Activity of a stage that has a Job and no obstacle."""


def _earlier_tries(view: RunView) -> str:
    """Message about the last failed pod of the stage that another pod replaces."""
    failed = [p for p in view.pods if p.phase == "Failed"]
    if not failed:
        return ""
    last = stage_failure(view.job, failed, None)
    return f". Retrying: pod {last.pod} failed ({last.reason}): {last.message}"
