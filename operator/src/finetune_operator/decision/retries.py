"""What is done after a failure instead of a replaced pod or the end of the run: the gang is
recreated, elsewhere, or after a pause, as ``failurePolicy.rules`` asks; elsewhere also if it fails
twice on a node, or once on a node whose conditions tell of a problem.

The Job controller treats the Job of a revision by the rules with which it was made
(``podFailurePolicy``): it replaces a pod, or ends the Job. Rules act on the outcome, so they also
apply to a gang that is at work: a Job that has failed is followed by that of the next revision, and
one that would replace a pod is deleted.
"""

from __future__ import annotations

from datetime import timedelta

from finetune_api.failures import Action, allowed_actions, row_of
from finetune_api.status import AvoidedNode, FailureStatus, Incident, QueueStatus
from finetune_operator.config import AVOIDED_AT_MOST, AVOIDED_FOR
from finetune_operator.decision.failures import by_rule
from finetune_operator.decision.incidents import MESSAGE_MAX, Incidents
from finetune_operator.decision.partial_gang import pause
from finetune_operator.decision.plan import Recreation
from finetune_operator.decision.run_view import RunView
from finetune_operator.world.objects import format_time, parse_time


def retry(view: RunView, cause: FailureStatus) -> Recreation | None:
    """The next revision after a failure that ends the run without a rule; None: it ends. Pods that
    cannot start have been waited for already."""
    action = by_rule(view.spec.failure_policy.rules, cause)
    cannot_start = "Gang" not in allowed_actions(cause.failure_class)
    if action is None or action == "End" or cannot_start:
        return None
    incidents = view.incidents.with_failure(cause, action, view.place, view.now)
    return _next_revision(view, cause, action, incidents)


def after_incident(view: RunView, incidents: Incidents | None = None) -> Recreation | None:
    """The next revision after an incident of this pass; None: the Job replaces the pod, or the run
    ends."""
    incidents = incidents or view.incidents
    cause = _on_bad_node(view, incidents)
    if cause is not None:
        return _next_revision(view, cause, "Elsewhere", incidents.acted("Elsewhere", cause))
    newest = incidents.new
    if newest is None or newest.action == "End":
        return None
    if newest.action == "Pod":
        if not _again_on_node(newest, incidents):
            return None
        return _next_revision(view, newest.failure, "Elsewhere", incidents.acted("Elsewhere"))
    for action in ("Gang", "Elsewhere", "Wait"):
        if action == newest.action:
            return _next_revision(view, newest.failure, action, incidents)
    return None


def _next_revision(
    view: RunView, cause: FailureStatus, action: Action, incidents: Incidents
) -> Recreation | None:
    """None if retries are exhausted."""
    why = f"after failure {cause.reason} of pod {cause.pod or '(none)'}"
    if action == "Wait":
        wait = _wait(view, cause)
        return Recreation(why, incidents, wait, view.avoided_nodes) if wait else None
    if incidents.new_fault and incidents.faults > view.spec.failure_policy.max_restarts:
        return None
    avoided = view.avoided_nodes
    if action == "Elsewhere" and cause.node is not None:
        avoided = _with_node(view, cause, cause.node)
        why += f", avoiding node {cause.node}"
    return Recreation(why, incidents, None, avoided)


def _on_bad_node(view: RunView, incidents: Incidents) -> FailureStatus | None:
    """The newest incident's failure, if its pod was replaced although its node has a problem. The
    node's conditions may become known after the incident."""
    newest = incidents.newest_first[0] if incidents.newest_first else None
    if newest is None or newest.action != "Pod" or not newest.fault:
        return None
    pod = next((p for p in view.pods if p.name == newest.failure.pod), None)
    if pod is None or not pod.node_problem:
        return None
    text = f"{newest.failure.message}. Its node {pod.node} has a problem: {pod.node_problem}"
    return newest.failure.model_copy(update={"message": text[:MESSAGE_MAX]})


def _again_on_node(newest: Incident, incidents: Incidents) -> bool:
    """Whether the newest incident is the second on its node for which the node may be the cause."""
    return _suspects(newest) and any(
        _suspects(i) and i.failure.node == newest.failure.node and _within(i, newest)
        for i in incidents.newest_first[1:]
    )


def _suspects(incident: Incident) -> bool:
    row = row_of(incident.failure.reason, incident.failure.exit_code)
    return row is not None and row.suspects_node and incident.failure.node is not None


def _within(earlier: Incident, newest: Incident) -> bool:
    first, last = parse_time(earlier.end_time), parse_time(newest.end_time)
    return first is not None and last is not None and last - first <= AVOIDED_FOR


def _with_node(view: RunView, cause: FailureStatus, node: str) -> tuple[AvoidedNode, ...]:
    raw = {
        "node": node,
        "until": format_time(view.now + AVOIDED_FOR),
        "message": f"{cause.reason}: {cause.message}"[:512],
    }
    others = [n for n in view.avoided_nodes if n.node != node]
    return (AvoidedNode.model_validate(raw), *others)[:AVOIDED_AT_MOST]


def _wait(view: RunView, cause: FailureStatus) -> QueueStatus | None:
    """The pause before the next try; None once the start deadline is over without a new
    checkpoint."""
    stored = view.queue_wait
    if stored is not None and stored.reason != cause.reason:
        stored = None
    since = parse_time(stored.since) if stored else None
    deadline = timedelta(seconds=view.spec.scheduling.start_deadline_seconds)
    if since is not None and view.now >= since + deadline:
        return None
    tries = (stored.tries if stored else 0) + 1
    return QueueStatus.model_validate(
        {
            "since": format_time(since or view.now),
            "reason": cause.reason,
            "tries": tries,
            "nextTryTime": format_time(view.now + pause(view.subject.uid, tries)),
            "message": f"{cause.reason}: {cause.message}"[:1024],
        }
    )


def rule_waits(view: RunView) -> bool:
    """Whether the wait by a rule goes on, although pods run: until the gang has saved a checkpoint,
    or the stage is done."""
    wait, known = view.queue_wait, view.incidents.newest_first
    if wait is None or wait.reason == "Unschedulable" or not known:
        return False
    made = [
        j for j in view.observed.jobs if (j.run, j.revision) == (view.run.id, view.run.revision)
    ]
    return known[0].checkpoint == view.latest_checkpoint and not any(j.complete for j in made)
