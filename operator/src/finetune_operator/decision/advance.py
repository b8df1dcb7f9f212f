"""The stages of a run, prepare → train → publish, and what each pass does about them.

``advance`` reads from top to bottom: what is done, what failed, what must stop, what must be made.
It fills the draft of the plan, and answers the new status.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from finetune_api.podtemplate import template_problems
from finetune_api.status import FailureStatus, FineTuneJobStatus
from finetune_operator.config import (
    ANNOTATION_OUTCOME,
    ANNOTATION_SUSPENDED,
    OVERDUE,
    WORD_AWAITED,
)
from finetune_operator.decision.failure import failure, verdict
from finetune_operator.decision.plan import Change, Create, Delete
from finetune_operator.decision.work import Work
from finetune_operator.status import status as status_of
from finetune_operator.world.observe import JobView

HISTORY: Final = 10


def advance(work: Work) -> FineTuneJobStatus:
    """One pass: fills ``work.draft`` and answers the new status."""
    _clean_up(work)
    if work.run.wait is not None:
        return status_of.suspended(work) if work.spec.suspend else status_of.waiting(work)
    if work.stage is None:
        _end(work, "Complete")
        return status_of.complete(work)
    failed = _failure(work)
    if failed is not None:
        _end(work, "Failed")
        return status_of.failed(work, failed)
    if work.spec.suspend:
        _suspend(work)
        return status_of.suspended(work)
    _make(work)
    return status_of.underway(work)


def _clean_up(work: Work) -> None:
    """Children of earlier runs, and gangs of earlier revisions. Orders stay with the history."""
    run, delete = work.run, work.draft.delete
    for job in work.observed.jobs:
        stale = job.run != run.id or (job.revision != run.revision and not job.finished)
        if stale and not job.deleting:
            delete.append(Delete("Job", job.name))
        elif job.role == "train" and work.done("train") and not (job.finished or job.stopping):
            work.draft.change.append(_stop(job))
    for service in work.observed.services:
        if (service.run, service.revision) != (run.id, run.revision):
            delete.append(Delete("Service", service.name))
    for order in work.observed.orders:
        if order.number < run.number - HISTORY:
            delete.append(Delete("ConfigMap", order.name))


def _failure(work: Work) -> FailureStatus | None:
    """Why the run has failed, or None while it goes on."""
    if work.run.outcome == "Failed":
        kept = work.before.failure if work.same_run else None
        return kept or verdict(work.job, work.pods, _attempt(work))
    job = work.job
    faults = template_problems(work.order.spec.compute.pod_template)
    if job is None and faults:
        return failure("UserError", "InvalidPodTemplate", "\n".join(faults))
    refusal = work.refusal
    if refusal is not None and refusal.final:
        return failure("UserError", "ChildRefused", f"Kubernetes refuses it: {refusal.message}")
    if job is not None and job.failed:
        return None if _pods_unseen(work, job) else verdict(job, work.pods, _attempt(work))
    if work.spec.suspend:
        return None
    allowed = work.spec.failure_policy.max_restarts
    if work.stage == "train" and work.restarts - work.run.restarts_before > allowed:
        return _exhausted(work, allowed)
    if work.obstacle is not None:
        if work.obstacle.until <= work.now:
            return work.obstacle.failure
        shown = work.obstacle.shown_from
        work.draft.look_at(shown if shown and shown > work.now else work.obstacle.until)
    return None


def _pods_unseen(work: Work, job: JobView) -> bool:
    """Whether a Job's failure came before the news of its pods, which may tell why."""
    if job.failed_at is None or any(p.phase == "Failed" for p in work.pods):
        return False
    due = job.failed_at + WORD_AWAITED
    if due > work.now:
        work.draft.look_at(due)
    return due > work.now


def _attempt(work: Work) -> int | None:
    progress = work.observed.progress
    if work.stage != "train" or progress is None or progress.run != work.run.id:
        return None
    return progress.attempt


def _exhausted(work: Work, allowed: int) -> FailureStatus:
    last = verdict(None, work.pods, _attempt(work))
    count = work.restarts - work.run.restarts_before
    end = (
        f" This was incident {count}; failurePolicy.maxRestarts allows {allowed}. The run goes on"
        " from its last commit when compute, scheduling or checkpoint is changed, or begins anew"
        " with another rerunToken"
    )
    if last.reason == "PodsGone":
        return failure("NodeFailure", "RestartsExhausted", f"the gang lost pods.{end}")
    message = f"{last.message[:3000]}.{end}"
    return last.model_copy(update={"message": message})


def _end(work: Work, outcome: str) -> None:
    """Stops what still runs, notes the outcome on the order, and keeps to the children's TTL."""
    job = work.job
    if job is not None and not (job.finished or job.stopping):
        work.draft.change.append(_stop(job))
    for order in work.observed.orders:
        newest = (order.run, order.revision) == (work.run.id, work.run.revision)
        if newest and order.outcome != outcome:
            note = {"metadata": {"annotations": {ANNOTATION_OUTCOME: outcome}}}
            work.draft.change.append(Change("ConfigMap", order.name, note))
    if not work.run.recorded and work.run.outcome is None:
        work.draft.create.append(Create("ConfigMap"))
    _expire(work)


def _stop(job: JobView) -> Change:
    """Ends a Job's pods; those that failed stay for their logs: deleting it would lose them."""
    return Change("Job", job.name, {"spec": {"activeDeadlineSeconds": 0}})


def _expire(work: Work) -> None:
    """Removes Jobs and Services once their time is up, but not before status has what they said:
    without either, their stage would begin again."""
    ttl = work.spec.children_ttl_seconds_after_finished
    if ttl is None or not (work.observed.jobs or work.observed.services):
        return
    kept = work.before.run if work.same_run else None
    if kept is None or kept.outcome is None or kept.revision != work.run.revision:
        return  # the pass that follows this status sees to it
    due = status_of.completion_time(work) + timedelta(seconds=ttl)
    if due > work.now:
        work.draft.look_at(due)
        return
    known = set(work.draft.delete)
    gone = [Delete("Job", j.name) for j in work.observed.jobs if not j.deleting]
    gone += [Delete("Service", s.name) for s in work.observed.services]
    work.draft.delete += [d for d in gone if d not in known]


def _suspend(work: Work) -> None:
    """Stops the stage's pods with their grace period. Under Kueue the Job itself goes: it would
    be admitted again, and its quota is given back this way."""
    _record(work)
    job = work.job
    if job is None or job.finished or job.deleting:
        return
    if work.queue is not None:
        work.draft.delete.append(Delete("Job", job.name))
    elif not job.suspended:
        work.draft.change.append(_hold(job, True))


def _hold(job: JobView, suspend: bool) -> Change:
    """Suspends a Job, noting that it was us; or lets it go on."""
    note = {"annotations": {ANNOTATION_SUSPENDED: "true" if suspend else None}}
    return Change("Job", job.name, {"metadata": note, "spec": {"suspend": suspend}})


def _make(work: Work) -> None:
    """Makes what the stage lacks; resumes what we have suspended."""
    _record(work)
    job = work.job
    if job is not None:
        if job.suspended and job.held and not job.deleting:
            work.draft.change.append(_hold(job, False))
        _make_service(work)
        return
    if _leftovers(work):
        return
    _make_service(work)
    work.draft.create.append(Create("Job", work.stage))


def _record(work: Work) -> None:
    if not work.run.recorded:
        work.draft.create.append(Create("ConfigMap"))


def _make_service(work: Work) -> None:
    here = ((s.run, s.revision) for s in work.observed.services)
    if work.stage == "train" and (work.run.id, work.run.revision) not in here:
        work.draft.create.append(Create("Service", "train"))


def _leftovers(work: Work) -> bool:
    """Whether an earlier gang of this run still works: the next one waits for it, but not for
    pods that ought to be gone (on a dead node they may terminate for ever)."""
    jobs = [j for j in work.observed.jobs if j.role == work.stage and j.run == work.run.id]
    pods = work.observed.pods_of(work.stage, work.run.id) if work.stage else []
    waiting = [p for p in pods if not p.ended]
    for pod in waiting:
        if pod.deleted_by is not None:
            work.draft.look_at(pod.deleted_by + OVERDUE)
    overdue = [p for p in waiting if p.deleted_by and p.deleted_by + OVERDUE <= work.now]
    return any(not j.finished for j in jobs) or len(waiting) > len(overdue)
