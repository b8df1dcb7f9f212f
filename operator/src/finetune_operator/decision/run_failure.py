"""Detection of a failed run, and the failure."""

from __future__ import annotations

from datetime import datetime

from finetune_api.podtemplate import template_problems
from finetune_api.status import FailureStatus
from finetune_operator.config import POD_FAILURE_AWAITED
from finetune_operator.decision.failures import by_rule, failure, stage_failure
from finetune_operator.decision.partial_gang import give_up
from finetune_operator.decision.retries import after_incident, retry
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
    cause = failed_stage(view)
    if cause is not None:
        return _unless_retried(view, cause)
    if view.spec.suspend or (view.job is not None and view.job.failed):
        return None
    cause = _incident_that_ends(view) or blocked(view)
    return _unless_retried(view, cause) if cause else give_up(view)


def failed_stage(view: RunView) -> FailureStatus | None:
    """Why the stage's Job has failed, or cannot go on, once its pods have shown the cause."""
    if view.job is not None and view.job.failed:
        return _of_stage(view) if pod_failure_due(view) is None else None
    return _of_stage(view) if view.failed_beside_sidecar else None


def blocked(view: RunView) -> FailureStatus | None:
    """The failure of pods that cannot run, once it is not waited for any longer."""
    obstacle = view.obstacle
    if obstacle is None:
        return None
    ends = by_rule(view.spec.failure_policy.rules, obstacle.failure) == "End"
    shown = obstacle.shown_from is None or obstacle.shown_from <= view.now
    return obstacle.failure if obstacle.until <= view.now or (ends and shown) else None


def _incident_that_ends(view: RunView) -> FailureStatus | None:
    """The cause of an incident from which the run does not recover."""
    known, newest = view.incidents, view.incidents.new
    if known.new_fault and known.faults > view.spec.failure_policy.max_restarts:
        return _restarts_exhausted(view, known.newest_first[0].failure, known.faults)
    if newest is None:
        return None
    waited = newest.action == "Wait" and after_incident(view) is None
    return newest.failure if newest.action == "End" or waited else None


def _unless_retried(view: RunView, cause: FailureStatus) -> FailureStatus | None:
    """None if ``failurePolicy.rules`` retries a failure that would end the run."""
    known = view.incidents
    if known.new is not None and known.new.failure.reason == cause.reason:
        return cause  # an incident, for which the rules were asked already
    if retry(view, cause) is not None:
        return None
    action = by_rule(view.spec.failure_policy.rules, cause)
    if action in ("Gang", "Elsewhere"):
        return _restarts_exhausted(view, cause, known.faults + 1)
    return cause


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


def _restarts_exhausted(view: RunView, cause: FailureStatus, faults: int) -> FailureStatus:
    end = (
        f" This was fault {faults}; failurePolicy.maxRestarts allows"
        f" {view.spec.failure_policy.max_restarts}. Another spec.retryToken continues the run from"
        " its last checkpoint; another rerunToken starts a new run"
    )
    return cause.model_copy(update={"message": f"{cause.message}.{end}"})
