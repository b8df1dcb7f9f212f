"""Events of what a pass has changed for a user."""

from __future__ import annotations

from finetune_api.status import FineTuneJobStatus
from finetune_operator.decision.plan import Event


def events(before: FineTuneJobStatus, after: FineTuneJobStatus) -> tuple[Event, ...]:
    """Events of what changed for a user: conditions that became true, incidents, new runs."""
    found = []
    begun = before.run.number if before.run and before.run.start_time else None
    if after.run and after.run.start_time and begun != after.run.number:
        from_ = f", from run {after.run.base.run} of {after.run.base.job}" if after.run.base else ""
        found.append(Event("Normal", "RunStarted", f"run {after.run.id} begins{from_}"))
    same_run = bool(before.run and after.run and before.run.id == after.run.id)
    if same_run and after.restarts > before.restarts:
        message = f"incident {after.restarts} of the gang; it goes on from its last commit"
        found.append(Event("Warning", "Restarted", message))
    held = {c.type for c in before.conditions if c.status == "True"} if same_run else set()
    for condition in after.conditions:
        if condition.status != "True" or condition.type in held | {"Ready", "Reconciling"}:
            continue
        if condition.type == "Stalled" and after.failure is not None:
            continue  # told by Failed
        bad = condition.type in ("Failed", "Stalled") or condition.reason == "MayNotFit"
        found.append(
            Event("Warning" if bad else "Normal", condition.reason, condition.message or "")
        )
    return tuple(found)
