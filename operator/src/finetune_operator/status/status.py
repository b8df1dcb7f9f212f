"""The new status of a pass: one function per state of a run, and one for a job without a run."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any, Final, Literal

from finetune_api.identity import network_policy_name
from finetune_api.names import Condition as ConditionType
from finetune_api.names import Phase
from finetune_api.status import FineTuneJobStatus
from finetune_operator.decision.plan import Decision, State, Subject
from finetune_operator.decision.run_view import RunView, gang_runs
from finetune_operator.decision.stages import CONDITION, GANG, STAGES
from finetune_operator.status.activity import activity
from finetune_operator.status.conditions import Conditions
from finetune_operator.status.results import results
from finetune_operator.status.run_record import history, run_record
from finetune_operator.world.observe import Refusal, child_key


def run_status(view: RunView, decision: Decision) -> FineTuneJobStatus:
    """Status of a job with a run, from the pass's decision about the run."""
    conditions = _conditions(view)
    phase = _STATES[decision.state](view, decision, conditions)
    refused = _refused_change(view, decision)
    if refused is not None:
        conditions.set("Reconciling", "True", "ChildRefused", f"retried: {refused.message}")
    stored = view.before if view.same_run else FineTuneJobStatus(history=history(view))
    outcome: Literal["Complete", "Failed"] | None = None
    if decision.state == "Complete" or decision.state == "Failed":
        outcome = decision.state
    generation = view.before.observed_generation if view.problems else view.subject.generation
    update: dict[str, Any] = {
        "observed_generation": generation,
        "phase": phase,
        "conditions": conditions.to_list(),
        "run": run_record(view, outcome),
        "restarts": view.restarts,
        "faults": view.incidents.faults,
        "incidents": list(view.incidents.newest_first),
        "queue": decision.queue,
        "avoided_nodes": list(view.avoided_nodes),
        "failure": decision.failure,
        **results(view, stored, decision.state),
    }
    return stored.model_copy(update=update)


def _refused_change(view: RunView, decision: Decision) -> Refusal | None:
    """The API server's refusal to change or delete a child, or of the NetworkPolicy of a run at
    work."""
    actions = decision.actions
    keys = [child_key(delete.kind, delete.name) for delete in actions.delete]
    keys += [child_key(change.kind, change.name) for change in actions.change]
    if view.job is not None:
        policy = network_policy_name(view.subject.name, view.run.id)
        keys.append(child_key("NetworkPolicy", policy))
    return next((r for r in map(view.observed.refused.get, keys) if r is not None), None)


# --- conditions that the stages lead to --------------------------------------------------------


def _conditions(view: RunView) -> Conditions:
    """The run's conditions, with those of finished stages set."""
    conditions = Conditions(
        view.before.conditions, view.subject.generation, view.now, keep=view.same_run
    )
    for type_, describe in REACHED.items():
        done = all(view.done(role) for role in STAGES if CONDITION[role] == type_)
        # Keep what is settled: the pods that reported the results may be gone.
        decided = type_ == CONDITION[GANG] and view.published is not None
        if done and (decided or not conditions.settled(type_)):
            conditions.set(type_, *describe(view))
    if view.problems:
        text = "the current spec is invalid; the run continues with its own spec:\n"
        conditions.set("Stalled", "True", "InvalidSpec", text + "\n".join(view.problems))
    else:
        conditions.set("Stalled", "False", "Progressing")
    return conditions


def _prepared(view: RunView) -> Reached:
    summary = view.prepared
    if summary is None:
        return "True", "DataReady", "the prepared data is in storage"
    measured = summary.test_samples + summary.retention_samples
    text = f"{summary.train_samples if summary.total_steps else measured} samples at {summary.uri}"
    if summary.memory is not None and summary.memory.warning:
        return "True", "MayNotFit", f"{text}. {summary.memory.warning}"
    return "True", "DataReady", text


def _evaluated(view: RunView) -> Reached:
    """Publish decides the gates, and says what the results recommend."""
    tested = view.trained is None or view.trained.scores
    published, spec = view.published, view.run_spec.spec
    text = "trained, and measured on the test sets" if tested else "trained; there is no test set"
    if not spec.method.kind.trains:
        text = "the model is measured on the test sets"
    if published is None:
        if spec.evaluation.gates or spec.output.current is not None:
            return "Unknown", "GatesPending", f"{text}; publish decides the gates"
        return "True", "Evaluated", text
    if published.held is not None:
        return "False", "GatesMissed", published.held
    if published.recommendation:
        text += f". {published.recommendation}"
    if published.overfitting:
        text += f". Overfitting: {published.overfitting}"
    if published.remedy:
        text += f". Remedy: {published.remedy}"
    return "True", "Evaluated", text


def _published(view: RunView) -> Reached:
    return "True", "Published", f"at {view.run_spec.output_uri}"


Reached = tuple[Literal["True", "False", "Unknown"], str, str]
"""Status, reason and message of a condition that a stage has led to."""
REACHED: Final[dict[ConditionType, Callable[[RunView], Reached]]] = {
    "Prepared": _prepared,
    "Evaluated": _evaluated,
    "Published": _published,
}
"""The conditions that stages lead to, once these are done."""


# --- states of a run: each sets conditions, and returns the phase ------------------------------


def _waiting(view: RunView, decision: Decision, conditions: Conditions) -> Phase:
    """The model that the run starts from is not published yet."""
    wait = view.run.wait
    assert wait is not None
    conditions.set("Prepared", "False", wait.reason, wait.message)
    conditions.set("Running", "False", wait.reason)
    conditions.set("Suspended", "False", "NotSuspended")
    conditions.set("Ready", "False", wait.reason, wait.message)
    if wait.stuck:
        conditions.set("Reconciling", "False", wait.reason)
        conditions.set("Stalled", "True", wait.reason, wait.message)
    else:
        _reconciling(conditions, wait.reason, wait.message)
    return "Waiting"


def _suspended(view: RunView, decision: Decision, conditions: Conditions) -> Phase:
    """spec.suspend stops the run."""
    ending = sum(1 for p in view.pods if not p.ended)
    message = "spec.suspend is true"
    if ending:
        message += f"; {ending} pods are ending"
    conditions.set("Running", "False", "Suspended", message)
    conditions.set("Suspended", "True", "Suspended", message)
    conditions.set("Ready", "False", "Suspended", message)
    _not_reconciling(conditions, "Suspended")
    return "Suspended"


def _active(view: RunView, decision: Decision, conditions: Conditions) -> Phase:
    """A stage is at work, or waits for something that it needs."""
    stage = view.stage
    assert stage is not None
    phase, reason, message = activity(view, decision)
    if stage == GANG:
        running = phase in ("Starting", "Training", "Evaluating") and gang_runs(view)
        conditions.set("Running", "True" if running else "False", reason, message)
    else:
        conditions.set("Running", "False", "NotTraining", f"stage: {stage}")
    conditions.set(CONDITION[stage], "False", reason, message)
    conditions.set("Suspended", "False", "NotSuspended")
    if conditions.has("Failed"):
        conditions.set("Failed", "False", "Resumed", "the spec was changed; the run continues")
    conditions.set("Ready", "False", reason, message)
    _reconciling(conditions, reason, message)
    return phase


def _failed(view: RunView, decision: Decision, conditions: Conditions) -> Phase:
    """The run has ended without a model."""
    failure = decision.failure
    assert failure is not None
    reason, message = failure.reason, failure.message
    if view.stage is not None:
        conditions.set(CONDITION[view.stage], "False", reason, message)
    conditions.set("Running", "False", "Finished", "the run has failed")
    conditions.set("Suspended", "False", "Finished")
    conditions.set("Failed", "True", reason, f"{failure.failure_class}: {message}")
    conditions.set("Ready", "False", reason, message)
    conditions.set("Reconciling", "False", "Failed")
    conditions.set("Stalled", "True", reason, message)
    return "Failed"


def _complete(view: RunView, decision: Decision, conditions: Conditions) -> Phase:
    """All stages are done."""
    where = f"the model is at {view.run_spec.output_uri}"
    conditions.set("Running", "False", "Finished", "the gang is done")
    conditions.set("Suspended", "False", "Finished")
    conditions.set("Complete", "True", "Published", where)
    if conditions.has("Failed"):
        conditions.set("Failed", "False", "Complete")
    conditions.set("Ready", "True", "Complete", where)
    _not_reconciling(conditions, "Complete")
    return "Complete"


_STATES: Final[dict[State, Callable[[RunView, Decision, Conditions], Phase]]] = {
    "Waiting": _waiting,
    "Suspended": _suspended,
    "Active": _active,
    "Failed": _failed,
    "Complete": _complete,
}


def _reconciling(conditions: Conditions, reason: str, message: str) -> None:
    """kstatus: the run is in progress. A job with a refused spec stays Stalled."""
    conditions.set("Reconciling", "True", reason, message)
    if not conditions.is_true("Stalled"):
        conditions.set("Stalled", "False", reason)


def _not_reconciling(conditions: Conditions, reason: str) -> None:
    """kstatus: the job is at rest. A job with a refused spec stays Stalled."""
    conditions.set("Reconciling", "False", reason)
    if not conditions.is_true("Stalled"):
        conditions.set("Stalled", "False", reason)


# --- a job without a run, and a pass that raised -----------------------------------------------


def suspended_from_start(
    before: FineTuneJobStatus, subject: Subject, now: datetime
) -> FineTuneJobStatus:
    """Status of a job that was suspended before its first run."""
    conditions = Conditions(before.conditions, subject.generation, now, keep=False)
    conditions.set("Suspended", "True", "Suspended", "spec.suspend is true: no run has begun")
    conditions.set("Ready", "False", "Suspended", "spec.suspend is true")
    conditions.set("Reconciling", "False", "Suspended")
    conditions.set("Stalled", "False", "Suspended")
    update = {
        "observed_generation": subject.generation,
        "phase": "Suspended",
        "conditions": conditions.to_list(),
    }
    return before.model_copy(update=update)


def refused_spec(
    before: FineTuneJobStatus, subject: Subject, problems: list[str], now: datetime
) -> FineTuneJobStatus:
    """Status of a job without a run whose spec this release's models refuse."""
    text = "\n".join(problems)
    conditions = Conditions(before.conditions, subject.generation, now, keep=True)
    conditions.set("Stalled", "True", "InvalidSpec", text)
    conditions.set("Ready", "False", "InvalidSpec", text)
    conditions.set("Reconciling", "False", "InvalidSpec")
    return before.model_copy(update={"phase": "Failed", "conditions": conditions.to_list()})


def operator_defect(
    before: FineTuneJobStatus, subject: Subject, error: Exception, now: datetime
) -> FineTuneJobStatus:
    """The stored status, with the defect of the operator that this pass raised."""
    conditions = Conditions(before.conditions, subject.generation, now, keep=True)
    text = (
        f"the operator has a defect ({type(error).__name__}: {error}); running children are left"
        " unchanged, and the pass is retried. Please report it with the operator's log"
    )
    conditions.set("Stalled", "True", "OperatorDefect", text)
    return before.model_copy(update={"conditions": conditions.to_list()})
