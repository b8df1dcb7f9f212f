"""Detection of a failed run, and the failure."""

from __future__ import annotations

from datetime import datetime

from finetune_api.podtemplate import template_problems
from finetune_api.status import FailureStatus
from finetune_operator.config import POD_FAILURE_AWAITED
from finetune_operator.decision.failures import failure, stage_failure
from finetune_operator.decision.partial_gang import give_up
from finetune_operator.decision.run_view import RunView
from finetune_operator.decision.stages import GANG


def run_failure(view: RunView) -> FailureStatus | None:
    """Why the run has failed, or None while it continues."""
    if view.run.outcome == "Failed":
        kept = view.before.failure if view.same_run else None
        return kept or _of_stage(view)
    problems = template_problems(view.run_spec.spec.compute.pod_template)
    if view.job is None and problems:
        return failure("InvalidPodTemplate", "\n".join(problems))
    refusal = view.refusal
    if refusal is not None and refusal.final:
        return failure("ChildRefused", f"Kubernetes refuses it: {refusal.message}")
    if view.job is not None and view.job.failed:
        return _of_stage(view) if pod_failure_due(view) is None else None
    if view.failed_beside_sidecar:
        return _of_stage(view)
    if view.spec.suspend:
        return None
    if view.incidents.new_fault and view.incidents.faults > view.spec.failure_policy.max_restarts:
        return _restarts_exhausted(view)
    if view.obstacle is not None and view.obstacle.until <= view.now:
        return view.obstacle.failure
    return give_up(view)


def pod_failure_due(view: RunView) -> datetime | None:
    """Time until which to wait for the failed pods of a failed Job, which may show the cause:
    watches of Jobs and of pods are not ordered relative to each other. None if there is nothing to
    wait for."""
    job = view.job
    if job is None or job.failed_at is None or any(p.phase == "Failed" for p in view.pods):
        return None
    due = job.failed_at + POD_FAILURE_AWAITED
    return due if due > view.now else None


def _of_stage(view: RunView) -> FailureStatus:
    return stage_failure(view.job, view.pods, _attempt(view))


def _attempt(view: RunView) -> int | None:
    return view.progress.attempt if view.stage == GANG and view.progress is not None else None


def _restarts_exhausted(view: RunView) -> FailureStatus:
    cause = view.incidents.newest_first[0].failure
    end = (
        f" This was fault {view.incidents.faults}; failurePolicy.maxRestarts allows"
        f" {view.spec.failure_policy.max_restarts}. Another spec.retryToken continues the run from"
        " its last checkpoint; another rerunToken starts a new run"
    )
    return cause.model_copy(update={"message": f"{cause.message}.{end}"})
