"""The pure pass: a stored job, its observed children and the time → a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from finetune_api.base import with_unknown
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus
from finetune_operator.config import Config
from finetune_operator.decision.advance import advance
from finetune_operator.decision.plan import Event, Plan, Subject
from finetune_operator.decision.recreate import recreation
from finetune_operator.decision.run_view import RunView
from finetune_operator.decision.runs import current_run, next_gang
from finetune_operator.status.changes import differs, events, urgency
from finetune_operator.status.status import (
    operator_defect,
    refused_spec,
    run_status,
    suspended_from_start,
)
from finetune_operator.world.observe import Observed
from finetune_operator.world.stored import StoredJob


def decide(job: StoredJob, observed: Observed, now: datetime, config: Config) -> Plan:
    """Return the plan that brings a FineTuneJob (as stored) closer to its spec. Total: it never
    raises on documents that a user or another release has stored."""
    subject = _subject(job)
    if "deletionTimestamp" in job.metadata:
        return Plan(subject)
    before, spec, problems = job.status, job.spec, job.problems
    run = current_run(subject, spec, before, observed, config)
    if run is None and spec is None:
        after = refused_spec(before, subject, problems, now)
        return _with_status(Plan(subject), job, before, after)
    if run is None:
        after = suspended_from_start(before, subject, now)
        return _with_status(Plan(subject), job, before, after)
    live = spec or _with_suspend(run.run_spec.spec, job.raw_spec)
    access = config.network.digest if config.network else None
    view = RunView(subject, live, problems, before, observed, run, now, access)
    again = recreation(view)
    if again is not None:
        run = next_gang(run, max(view.restarts, again.incidents.count))
        view = replace(view, run=run, recreation=again)
    decision = advance(view)
    actions = decision.actions
    plan = Plan(
        subject=subject,
        run=replace(
            run,
            avoid_nodes=tuple(n.node for n in view.avoided_nodes),
            grace_seconds=view.grace_seconds,
        ),
        delete=tuple(actions.delete),
        create=tuple(actions.create),
        change=tuple(actions.change),
        requeue_after=actions.requeue_after(now),
    )
    plan = _with_status(plan, job, before, run_status(view, decision))
    if again is None:
        return plan
    text = f"{again.why}: pods are recreated, as revision {run.revision} of the run"
    return replace(plan, events=(*plan.events, Event("Warning", "PodsRecreated", text)))


def defect(job: StoredJob, error: Exception, now: datetime) -> Plan:
    """Plan of a pass in which ``decide`` or ``render`` raised: only a status with the error."""
    subject, before = _subject(job), job.status
    after = operator_defect(before, subject, error, now)
    return _with_status(Plan(subject), job, before, after)


def _subject(job: StoredJob) -> Subject:
    meta = job.metadata
    return Subject(meta["namespace"], meta["name"], meta["uid"], meta.get("generation", 1))


def _with_suspend(spec: FineTuneJobSpec, raw: Any) -> FineTuneJobSpec:
    """The run's own spec, with ``suspend`` of the current, otherwise invalid spec."""
    suspend = raw.get("suspend", False) if isinstance(raw, Mapping) else None
    return spec.model_copy(update={"suspend": suspend}) if isinstance(suspend, bool) else spec


def _with_status(
    plan: Plan, job: StoredJob, before: FineTuneJobStatus, after: FineTuneJobStatus
) -> Plan:
    """The plan with the new status and its events, if the status differs from the stored one.
    Fields that this release does not know are kept within a run."""
    status = after.to_json()
    if before.run is None or after.run is None or before.run.id == after.run.id:
        status = with_unknown(FineTuneJobStatus, job.raw_status, status)
    if not differs(job.raw_status, status):
        return plan
    due = urgency(before, after)
    return replace(plan, status=status, urgency=due, events=events(before, after))
