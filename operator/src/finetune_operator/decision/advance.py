"""The actions of a pass: what to delete, stop, suspend or create to bring a run closer to its end.

``advance`` reads from top to bottom. The functions below it only add to ``actions``.
"""

from __future__ import annotations

from datetime import timedelta

from finetune_api.status import QueueStatus
from finetune_operator.config import ANNOTATION_OUTCOME, HISTORY, OVERDUE
from finetune_operator.decision.partial_gang import next_try, release, release_due, waits_for_nodes
from finetune_operator.decision.plan import Actions, Change, Create, Decision, Delete
from finetune_operator.decision.recreate import recreate_due
from finetune_operator.decision.retries import rule_waits
from finetune_operator.decision.run_failure import pod_failure_due, run_failure
from finetune_operator.decision.run_view import RunView, is_elastic
from finetune_operator.decision.stages import GANG, akin
from finetune_operator.world.children import JobView
from finetune_operator.world.pods import PodView


def advance(view: RunView) -> Decision:
    """Return the state of a run, and the actions of this pass."""
    actions = Actions()
    _remove_stale(view, actions)
    _wake_for_released_gang(view, actions)
    if view.run.wait is not None:
        return Decision("Suspended" if view.spec.suspend else "Waiting", actions)
    if view.stage is None:
        _finish(view, actions, "Complete")
        return Decision("Complete", actions)
    failure = run_failure(view)
    if failure is not None:
        _finish(view, actions, "Failed")
        return Decision("Failed", actions, failure)
    _wake_for_pod_failure(view, actions)
    _record_run(view, actions)
    if view.spec.suspend:
        _suspend(view, actions)
        return Decision("Suspended", actions)
    _wake_for_obstacle(view, actions)
    _wake_for_recreate(view, actions)
    queue = _release_partial_gang(view, actions)
    if queue is None:
        _make_stage(view, actions)
        queue = view.queue_wait if waits_for_nodes(view) or rule_waits(view) else None
    return Decision("Active", actions, queue=queue)


# --- children that are not needed any more -----------------------------------------------------


def _remove_stale(view: RunView, actions: Actions) -> None:
    """Delete children of earlier runs, and gangs of earlier revisions. Run specs are kept as long
    as their runs are in status.history."""
    run = view.run
    for job in view.observed.jobs:
        stale = job.run != run.id or (job.revision != run.revision and not job.finished)
        if stale and not job.deleting:
            actions.delete.append(Delete("Job", job.name))
        elif view.done(job.role) and not (job.finished or job.stopping or job.deleting):
            pods = view.observed.pods_of(job.role, job.run, job.revision)
            if job.suspended or any(not pod.ended for pod in pods):
                _stop(job, actions)
    for service in view.observed.services:
        if (service.run, service.revision) != (run.id, run.revision):
            actions.delete.append(Delete("Service", service.name))
    for run_spec in view.observed.run_specs:
        if run_spec.number < run.number - HISTORY:
            actions.delete.append(Delete("ConfigMap", run_spec.name))
    _remove_policies(view, actions)


def _remove_policies(view: RunView, actions: Actions) -> None:
    """Delete the NetworkPolicies of runs that have neither a Job nor a pod that may run, apart from
    the run at work; all of them if there are to be none."""
    observed = view.observed
    needed = {p.run for p in observed.pods if not p.ended} | {job.run for job in observed.jobs}
    if view.stage is not None and view.run.outcome is None:
        needed.add(view.run.id)
    for policy in observed.policies:
        if view.access is None or policy.run not in needed:
            actions.delete.append(Delete("NetworkPolicy", policy.name))


def _stop(job: JobView, actions: Actions) -> None:
    """Terminate a Job's pods. Deleting the Job would also delete the failed pods with their logs;
    a suspended Job has no pods, and would ignore a deadline."""
    if job.suspended:
        actions.delete.append(Delete("Job", job.name))
    else:
        stop = {"spec": {"activeDeadlineSeconds": 0}}
        actions.change.append(Change("Job", job.name, stop))


# --- a run that ends ---------------------------------------------------------------------------


def _finish(view: RunView, actions: Actions, outcome: str) -> None:
    """Stop running pods, record the outcome on the run spec's ConfigMap once status has it with its
    cause, and delete children after their TTL."""
    job = view.job
    if job is not None and not (job.finished or job.stopping or job.deleting):
        _stop(job, actions)
    for run_spec in view.observed.run_specs:
        newest = (run_spec.run, run_spec.revision) == (view.run.id, view.run.revision)
        if newest and run_spec.outcome is None and _in_status(view, outcome):
            note = {"metadata": {"annotations": {ANNOTATION_OUTCOME: outcome}}}
            actions.change.append(Change("ConfigMap", run_spec.name, note))
    if view.run.outcome is None:
        _record_run(view, actions)
    _expire_children(view, actions)


def _in_status(view: RunView, outcome: str) -> bool:
    run = view.before.run if view.same_run else None
    return run is not None and (run.outcome, run.revision) == (outcome, view.run.revision)


def _expire_children(view: RunView, actions: Actions) -> None:
    """Delete Jobs and Services after their TTL, but only once status has their results: with both
    lost, the stages would run again."""
    ttl = view.spec.children_ttl_seconds_after_finished
    if ttl is None or not (view.observed.jobs or view.observed.services):
        return
    kept = view.before.run if view.same_run else None
    if kept is None or kept.outcome is None or kept.revision != view.run.revision:
        return  # a pass after this status is written deletes the children
    due = view.completion_time + timedelta(seconds=ttl)
    if due > view.now:
        actions.wake_at(due)
        return
    known = set(actions.delete)
    expired = [Delete("Job", j.name) for j in view.observed.jobs if not j.deleting]
    expired += [Delete("Service", s.name) for s in view.observed.services]
    actions.delete += [d for d in expired if d not in known]


# --- a run that is suspended -------------------------------------------------------------------


def _suspend(view: RunView, actions: Actions) -> None:
    """Delete the stage's Job: its pods end with their grace period. A suspended Job would keep the
    count of failed pods, and with it its back-off; Kueue would admit it again."""
    job = view.job
    if job is not None and not (job.finished or job.deleting):
        actions.delete.append(Delete("Job", job.name))


# --- a stage at work ---------------------------------------------------------------------------


def _record_run(view: RunView, actions: Actions) -> None:
    """Create the ConfigMap with the run spec if it does not exist."""
    if not view.run.recorded:
        actions.create.append(Create("ConfigMap"))


def _make_stage(view: RunView, actions: Actions) -> None:
    """Create the stage's missing children: the NetworkPolicy before any pod."""
    if view.job is not None:
        _make_policy(view, actions)
        _make_service(view, actions)
        return
    leftovers = _leftover_pods(view)
    for pod in leftovers:
        if pod.deleted_by is not None:
            actions.wake_at(pod.deleted_by + OVERDUE)
    if _leftover_jobs(view) or any(not _overdue(pod, view) for pod in leftovers):
        return
    _make_policy(view, actions)
    _make_service(view, actions)
    actions.create.append(Create("Job", view.stage))


def _make_policy(view: RunView, actions: Actions) -> None:
    """Create the run's NetworkPolicy, or change one of other settings."""
    present = {(policy.run, policy.access) for policy in view.observed.policies}
    if view.access is not None and (view.run.id, view.access) not in present:
        actions.create.append(Create("NetworkPolicy"))


def _make_service(view: RunView, actions: Actions) -> None:
    present = ((s.run, s.revision) for s in view.observed.services)
    if view.stage == GANG and (view.run.id, view.run.revision) not in present:
        actions.create.append(Create("Service", GANG))


def _leftover_jobs(view: RunView) -> list[JobView]:
    """Unfinished Jobs of the run's earlier revisions, of the stage or of a stage with the same
    output."""
    roles = akin(view.stage)
    jobs = (j for j in view.observed.jobs if j.role in roles and j.run == view.run.id)
    return [j for j in jobs if not j.finished]


def _leftover_pods(view: RunView) -> list[PodView]:
    """Pods that still run for the run's earlier revisions, of the stage or of a stage with the same
    output. A gang with a pod on a lost node is not waited for: it cannot save its state, unless it
    is elastic."""
    pods = [p for role in akin(view.stage) for p in view.observed.pods_of(role, view.run.id)]
    lost = {(p.role, p.revision) for p in pods if p.on_lost_node and not is_elastic(view)}
    pods = [p for p in pods if not p.ended and not p.on_lost_node]
    return [p for p in pods if (p.role, p.revision) not in lost]


def _overdue(pod: PodView, view: RunView) -> bool:
    """Whether a pod should be gone: on a dead node it may terminate forever, so the next gang does
    not wait for it."""
    return pod.deleted_by is not None and pod.deleted_by + OVERDUE <= view.now


def _release_partial_gang(view: RunView, actions: Actions) -> QueueStatus | None:
    """Give the nodes of a gang back if some of its pods find none, and wait for the next try.
    Returns the wait, or None if there is none."""
    due = release_due(view)
    if due is not None and due > view.now:
        actions.wake_at(due)
    begun = release(view)
    if begun is not None and view.job is not None:
        actions.delete.append(Delete("Job", view.job.name))
        return begun
    again = next_try(view)
    if again is None:
        return None
    actions.wake_at(again)
    return view.queue_wait


# --- wake-ups ----------------------------------------------------------------------------------


def _wake_for_released_gang(view: RunView, actions: Actions) -> None:
    released = view.gang_released_at
    if released is not None and released > view.now:
        actions.wake_at(released)


def _wake_for_pod_failure(view: RunView, actions: Actions) -> None:
    due = pod_failure_due(view)
    if due is not None:
        actions.wake_at(due)


def _wake_for_obstacle(view: RunView, actions: Actions) -> None:
    """Wake when status must show the obstacle, then when it becomes a failure."""
    if view.obstacle is None:
        return
    shown = view.obstacle.shown_from
    actions.wake_at(shown if shown and shown > view.now else view.obstacle.until)


def _wake_for_recreate(view: RunView, actions: Actions) -> None:
    due = recreate_due(view)
    if due is not None:
        actions.wake_at(due)
