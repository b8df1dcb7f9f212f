"""The pure decision: one job, what is there of it, and the time → everything this pass does."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from finetune_api.base import InvalidSpec
from finetune_api.spec import FineTuneJobSpec, parse_spec
from finetune_api.status import FineTuneJobStatus
from finetune_operator.config import Config
from finetune_operator.decision.advance import advance
from finetune_operator.decision.plan import Plan, Subject
from finetune_operator.decision.runs import current_run
from finetune_operator.decision.work import Work
from finetune_operator.status.conditions import Conditions
from finetune_operator.status.events import events
from finetune_operator.world.observe import Observed
from finetune_operator.world.stored import read_status


def decide(job: Mapping[str, Any], observed: Observed, now: datetime, config: Config) -> Plan:
    """The plan that brings a FineTuneJob (as stored) closer to its spec. Total: never raises on
    what a user or another release may have stored."""
    subject = subject_of(job)
    if "deletionTimestamp" in job["metadata"]:
        return Plan(subject)
    before = read_status(job.get("status"))
    spec, problems = _read_spec(job.get("spec"))
    run = current_run(subject, spec, before, observed, config)
    if run is None:
        after = _no_run(before, subject, spec, problems, now)
        return _plan(job, Plan(subject), before, after)
    live = spec or _with_live(run.order.spec, job.get("spec"))
    work = Work(subject, live, problems, before, observed, run, now)
    after = advance(work)
    draft = work.draft
    plan = Plan(
        subject=subject,
        run=run,
        delete=tuple(draft.delete),
        create=tuple(draft.create),
        change=tuple(draft.change),
        look_again=draft.look_again(now),
    )
    return _plan(job, plan, before, after)


def defect(job: Mapping[str, Any], error: Exception, now: datetime) -> Plan:
    """The plan of a pass that has met a defect of ours: status as it was, and what is wrong."""
    subject, before = subject_of(job), read_status(job.get("status"))
    conditions = Conditions(before.conditions, subject.generation, now, keep=True)
    text = (
        f"the operator has met a defect of its own ({type(error).__name__}: {error}); what runs is"
        " left alone, and it is tried again. Please report it with the operator's log"
    )
    conditions.set("Stalled", "True", "OperatorDefect", text)
    after = before.model_copy(update={"conditions": conditions.to_list()})
    return _plan(job, Plan(subject), before, after)


def subject_of(job: Mapping[str, Any]) -> Subject:
    """Who the job is."""
    meta = job["metadata"]
    return Subject(meta["namespace"], meta["name"], meta["uid"], meta.get("generation", 1))


def _read_spec(raw: Any) -> tuple[FineTuneJobSpec | None, list[str]]:
    """Stored objects may be older than today's models: what they refuse is a condition."""
    try:
        return parse_spec(raw), []
    except InvalidSpec as error:
        return None, error.problems


def _with_live(spec: FineTuneJobSpec, raw: Any) -> FineTuneJobSpec:
    """A run's own spec, with what a refused one says plainly: whether to hold nodes."""
    suspend = raw.get("suspend", False) if isinstance(raw, Mapping) else None
    return spec.model_copy(update={"suspend": suspend}) if isinstance(suspend, bool) else spec


def _plan(
    job: Mapping[str, Any], plan: Plan, before: FineTuneJobStatus, after: FineTuneJobStatus
) -> Plan:
    status = after.to_json()
    if _comparable(status) == _comparable(job.get("status") or {}):
        return plan
    return Plan(
        subject=plan.subject,
        run=plan.run,
        delete=plan.delete,
        create=plan.create,
        change=plan.change,
        status=status,
        events=events(before, after),
        look_again=plan.look_again,
    )


def _comparable(status: Mapping[str, Any]) -> dict[str, Any]:
    """A status without what the API server may store otherwise: order of conditions, empty
    lists."""
    plain = {k: v for k, v in status.items() if v not in ([], None)}
    if "conditions" in plain:
        plain["conditions"] = sorted(plain["conditions"], key=_type_of)
    return plain


def _type_of(condition: Any) -> str:
    return str(condition.get("type")) if isinstance(condition, dict) else ""


def _no_run(
    before: FineTuneJobStatus,
    subject: Subject,
    spec: FineTuneJobSpec | None,
    problems: list[str],
    now: datetime,
) -> FineTuneJobStatus:
    """Status where no run has begun: the spec is refused, or suspended from the start."""
    generation = subject.generation if spec else before.observed_generation
    conditions = Conditions(before.conditions, subject.generation, now, keep=spec is None)
    if spec is not None:
        conditions.set("Suspended", "True", "Suspended", "spec.suspend is true: no run has begun")
        conditions.set("Ready", "False", "Suspended", "spec.suspend is true")
        conditions.set("Reconciling", "False", "Suspended")
        conditions.set("Stalled", "False", "Suspended")
    else:
        text = "\n".join(problems)
        conditions.set("Stalled", "True", "InvalidSpec", text)
        conditions.set("Ready", "False", "InvalidSpec", text)
        conditions.set("Reconciling", "False", "InvalidSpec")
    return before.model_copy(
        update={
            "observed_generation": generation,
            "phase": "Suspended" if spec else "Failed",
            "conditions": conditions.to_list(),
        }
    )
