"""Differences between two statuses: whether to write, how soon, and the events for them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from finetune_api.status import FineTuneJobStatus
from finetune_operator.decision.plan import Event, Urgency

_FIGURES: Final = ("prepared", "usage", "startup")
_MAY_WAIT: Final = ("phase", "progress", "checkpoints", "conditions", *_FIGURES)
_CONDITIONS_WAIT: Final = ("Reconciling", "Prepared", "Running", "Evaluated", "Published")
_EXPECTED: Final = ("Ready", *_CONDITIONS_WAIT)
"""Conditions without an event: the normal course of a run, which status shows with its times."""


def differs(stored: Mapping[str, Any] | None, status: Mapping[str, Any]) -> bool:
    """Whether a status differs from the stored one, apart from the time up to which GPU time is
    counted."""
    return _comparable(status) != _comparable(stored or {})


def urgency(before: FineTuneJobStatus, after: FineTuneJobStatus) -> Urgency:
    """When a changed status must be written. Of progress, messages and a run's way from stage to
    stage a user misses nothing if they are written a few seconds later, together with the next
    ones, and no later pass depends on them; the sums of a finished or long stage can wait
    longer."""
    if _outline(before) != _outline(after):
        return "AtOnce"
    return "Soon" if _without(before, _FIGURES) != _without(after, _FIGURES) else "Later"


def _outline(status: FineTuneJobStatus) -> dict[str, Any]:
    conditions = {
        (c.type, c.status, c.observed_generation)
        for c in status.conditions
        if c.type not in _CONDITIONS_WAIT
    }
    return {**_without(status, _MAY_WAIT), "conditions": conditions}


def _without(status: FineTuneJobStatus, fields: Collection[str]) -> dict[str, Any]:
    return {k: v for k, v in status.__dict__.items() if k not in fields}


def _comparable(status: Mapping[str, Any]) -> dict[str, Any]:
    """A status without the parts that the API server may store in another form: order of
    conditions, empty lists."""
    plain = {k: v for k, v in status.items() if v not in ([], None)}
    if isinstance(usage := plain.get("usage"), dict):
        plain["usage"] = {k: v for k, v in usage.items() if k != "until"}
    if "conditions" in plain:
        plain["conditions"] = sorted(plain["conditions"], key=_type_of)
    return plain


def _type_of(condition: Any) -> str:
    return str(condition.get("type")) if isinstance(condition, dict) else ""


def events(before: FineTuneJobStatus, after: FineTuneJobStatus) -> tuple[Event, ...]:
    """Events for runs after the first, incidents, and conditions that became true unless they are
    expected. Each is a write, and a burst of new jobs would be a burst of events."""
    found = []
    begun = before.run.number if before.run and before.run.start_time else None
    first = after.run is not None and after.run.number == 1 and after.run.base is None
    if after.run and after.run.start_time and begun != after.run.number and not first:
        from_ = f", from run {after.run.base.run} of {after.run.base.job}" if after.run.base else ""
        found.append(Event("Normal", "RunStarted", f"run {after.run.id} begins{from_}"))
    same_run = bool(before.run and after.run and before.run.id == after.run.id)
    if same_run and after.restarts > before.restarts:
        found.append(Event("Warning", "Restarted", _restarted(after)))
    if after.output is not None and (before.output is None or not same_run):
        if after.output.held is not None:
            found.append(Event("Warning", "GatesMissed", after.output.held))
        elif after.output.became_current:
            text = f"the current model is now {after.output.uri}"
            found.append(Event("Normal", "BecameCurrent", text))
    true_before = {c.type for c in before.conditions if c.status == "True"} if same_run else set()
    for condition in after.conditions:
        bad = condition.type in ("Failed", "Stalled") or condition.reason == "MayNotFit"
        if condition.status != "True" or condition.type in true_before:
            continue
        if condition.type in _EXPECTED and not bad:
            continue
        if condition.type == "Stalled" and after.failure is not None:
            continue  # the event of condition Failed has the same message
        found.append(
            Event("Warning" if bad else "Normal", condition.reason, condition.message or "")
        )
    return tuple(found)


def _restarted(after: FineTuneJobStatus) -> str:
    """Message about the newest incident."""
    text = f"restart {after.restarts} of the gang; it resumes from its last checkpoint"
    if not after.incidents or after.incidents[0].number < after.restarts:
        return text
    cause = after.incidents[0].failure
    where = f" on node {cause.node}" if cause.node else ""
    return f"{text}. Pod {cause.pod}{where}: {cause.reason}: {cause.message}"
