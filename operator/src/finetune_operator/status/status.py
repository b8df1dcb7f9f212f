"""The new status of a pass, for each way in which it can end."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from finetune_api.names import Phase
from finetune_api.status import (
    Checkpoints,
    FailureStatus,
    FineTuneJobStatus,
    ParameterStatus,
    Run,
    RunBase,
    StartupStatus,
)
from finetune_operator.decision.failure import verdict
from finetune_operator.decision.stages import STAGE_CONDITION
from finetune_operator.decision.work import Work
from finetune_operator.status import figures
from finetune_operator.status.conditions import Conditions
from finetune_operator.status.models import make
from finetune_operator.status.startup import startup
from finetune_operator.status.usage import usage
from finetune_operator.world.objects import format_time, parse_time


def complete(work: Work) -> FineTuneJobStatus:
    """Everything is done."""
    conditions = _conditions(work)
    where = f"the model is at {work.order.output_uri}"
    conditions.set("Running", "False", "Finished", "the gang is done")
    conditions.set("Suspended", "False", "Finished")
    conditions.set("Complete", "True", "Published", where)
    if conditions.has("Failed"):
        conditions.set("Failed", "False", "Complete")
    conditions.set("Ready", "True", "Complete", where)
    _kstatus(conditions, "Complete", reconciling=False)
    return _assemble(work, "Complete", conditions, outcome="Complete")


def failed(work: Work, failure: FailureStatus) -> FineTuneJobStatus:
    """The run has ended without a model."""
    conditions = _conditions(work)
    reason, message = failure.reason, failure.message
    if work.stage is not None:
        conditions.set(STAGE_CONDITION[work.stage], "False", reason, message)
    conditions.set("Running", "False", "Finished", "the run has failed")
    conditions.set("Suspended", "False", "Finished")
    conditions.set("Failed", "True", reason, f"{failure.failure_class}: {message}")
    conditions.set("Ready", "False", reason, message)
    conditions.set("Reconciling", "False", "Failed")
    conditions.set("Stalled", "True", reason, message)
    return _assemble(work, "Failed", conditions, outcome="Failed", failure=failure)


def suspended(work: Work) -> FineTuneJobStatus:
    """spec.suspend holds the run."""
    conditions = _conditions(work)
    live = sum(1 for p in work.pods if not p.ended)
    message = f"spec.suspend is true; {live} pods are ending" if live else "spec.suspend is true"
    conditions.set("Running", "False", "Suspended", message)
    conditions.set("Suspended", "True", "Suspended", message)
    conditions.set("Ready", "False", "Suspended", message)
    _kstatus(conditions, "Suspended", reconciling=False)
    return _assemble(work, "Suspended", conditions)


def waiting(work: Work) -> FineTuneJobStatus:
    """The model that the run starts from is not published yet."""
    wait = work.run.wait
    assert wait is not None
    conditions = _conditions(work)
    conditions.set("Prepared", "False", wait.reason, wait.message)
    conditions.set("Running", "False", wait.reason)
    conditions.set("Suspended", "False", "NotSuspended")
    conditions.set("Ready", "False", wait.reason, wait.message)
    if wait.stuck:
        conditions.set("Reconciling", "False", wait.reason)
        conditions.set("Stalled", "True", wait.reason, wait.message)
    else:
        _kstatus(conditions, wait.reason, reconciling=True, message=wait.message)
    return _assemble(work, "Waiting", conditions)


def underway(work: Work) -> FineTuneJobStatus:
    """The run goes on."""
    conditions = _conditions(work)
    phase, reason, message = _where(work)
    stage = work.stage
    assert stage is not None
    if stage == "train":
        running = phase in ("Starting", "Training") and _all_run(work)
        conditions.set("Running", "True" if running else "False", reason, message)
    else:
        conditions.set("Running", "False", "NotTraining", f"stage: {stage}")
    conditions.set(STAGE_CONDITION[stage], "False", reason, message)
    conditions.set("Suspended", "False", "NotSuspended")
    if conditions.has("Failed"):
        conditions.set("Failed", "False", "Resumed", "the spec was changed; the run goes on")
    conditions.set("Ready", "False", reason, message)
    _kstatus(conditions, reason, reconciling=True, message=message)
    return _assemble(work, phase, conditions)


def _kstatus(conditions: Conditions, reason: str, *, reconciling: bool, message: str = "") -> None:
    conditions.set("Reconciling", "True" if reconciling else "False", reason, message)
    if not conditions.holds("Stalled"):
        conditions.set("Stalled", "False", reason)


def _where(work: Work) -> tuple[Phase, str, str]:
    """Phase, reason and message of a run that goes on."""
    stage, job, held = work.stage, work.job, work.obstacle
    first: Phase = "Pending" if stage == "prepare" else "Publishing"
    if stage == "train":
        first = "Starting"
    if work.refusal is not None:
        return first, "ChildRefused", f"tried again until it is allowed: {work.refusal.message}"
    made_now = any(c.kind == "Job" for c in work.draft.create)
    if job is None and not made_now:
        return first, "Pending", f"making the Job of {stage}, after pods of an earlier one ended"
    if held is not None and (held.shown_from is None or held.shown_from <= work.now):
        return first, held.reason, held.message
    if stage == "train":
        return _gang(work)
    running = len({p.index for p in work.pods if p.running})
    if stage == "prepare":
        text = "access check, split, rendering, tokenizing"
        if work.order.spec.prepare.workers > 1:
            text += f"; {running} of {work.order.spec.prepare.workers} workers run"
        text += _tried(work)
        return ("Preparing" if running else "Pending"), "Preparing", text
    text = "writing the model, its metrics and its report"
    return "Publishing", "Publishing", text + _tried(work)


def _tried(work: Work) -> str:
    """Why pods of the stage have failed that others replace."""
    failed = [p for p in work.pods if p.phase == "Failed"]
    if not failed:
        return ""
    last = verdict(work.job, failed, None)
    return f". Tried again: pod {last.pod} failed ({last.reason}): {last.message}"


def _gang(work: Work) -> tuple[Phase, str, str]:
    job, nodes = work.job, work.order.spec.compute.nodes
    if work.queue is not None and (job is None or job.suspended):
        return "Queued", "Queued", f"waiting in queue {work.queue}"
    if job is not None and job.suspended and not job.held:
        return "Queued", "Queued", "the Job was suspended by another than this operator"
    alive = sum(1 for p in work.pods if p.running)
    text = f"{alive} of {nodes} pods run"
    if not _all_run(work):
        return "Starting", "Starting", text
    progress = work.observed.progress
    loading = progress is not None and progress.run == work.run.id and progress.stage == "Loading"
    return ("Starting" if loading else "Training"), "GangRunning", text


def _all_run(work: Work) -> bool:
    ranks = {p.index for p in work.pods if p.running}
    return len(ranks) >= work.order.spec.compute.nodes


def _conditions(work: Work) -> Conditions:
    """The run's conditions with what is done so far."""
    conditions = Conditions(
        work.before.conditions, work.subject.generation, work.now, keep=work.same_run
    )
    if work.done("prepare"):
        reason, text = "DataReady", "the prepared data is in storage"
        if work.prepared is not None:
            text = f"{work.prepared.train_samples} samples at {work.prepared.uri}"
            memory = work.prepared.memory
            if memory is not None and memory.warning:
                reason, text = "MayNotFit", f"{text}. {memory.warning}"
        _once(conditions, "Prepared", reason, text)
    if work.done("train"):
        tested = work.trained is None or work.trained.scores
        text = (
            "trained, and measured on the test sets" if tested else "trained; there is no test set"
        )
        _once(conditions, "Evaluated", "Evaluated", text)
    if work.done("publish"):
        _once(conditions, "Published", "Published", f"at {work.order.output_uri}")
    if work.problems:
        text = "the spec as it stands is refused, the run goes on without it:\n"
        conditions.set("Stalled", "True", "InvalidSpec", text + "\n".join(work.problems))
    else:
        conditions.set("Stalled", "False", "Progressing")
    return conditions


def _once(
    conditions: Conditions,
    type_: Literal["Prepared", "Evaluated", "Published"],
    reason: str,
    message: str,
) -> None:
    """What was reached stays as it was said: the pods that said it may be gone."""
    if not conditions.holds(type_):
        conditions.set(type_, "True", reason, message)


def completion_time(work: Work) -> datetime:
    """When the run ended: as recorded, or now."""
    run = work.before.run
    known = parse_time(run.completion_time) if run and work.same_run else None
    return known if known and work.run.outcome else work.now


def _assemble(
    work: Work,
    phase: Phase,
    conditions: Conditions,
    outcome: Literal["Complete", "Failed"] | None = None,
    failure: FailureStatus | None = None,
) -> FineTuneJobStatus:
    base = work.before if work.same_run else FineTuneJobStatus(history=_history(work))
    update: dict[str, Any] = {
        "observed_generation": work.before.observed_generation
        if work.problems
        else work.subject.generation,
        "phase": phase,
        "conditions": conditions.to_list(),
        "run": _run(work, outcome),
        "restarts": work.restarts,
        "failure": failure,
        **_results(work, base),
    }
    return base.model_copy(update=update)


def _history(work: Work) -> list[Run]:
    """Earlier runs, newest first."""
    earlier, last = work.before.history, work.before.run
    if last is None:
        return earlier
    ended = last.model_copy(
        update={
            "outcome": last.outcome or "Superseded",
            "completion_time": last.completion_time or format_time(work.now),
        }
    )
    return [ended, *earlier][:10]


def _run(work: Work, outcome: Literal["Complete", "Failed"] | None) -> Run:
    known = work.before.run if work.same_run else None
    progress = work.observed.progress
    attempts = [known.attempt if known else 0]
    if progress is not None and progress.run == work.run.id:
        attempts.append(progress.attempt)
    if work.trained is not None:
        attempts.append(work.trained.attempt)
    return make(
        Run,
        id=work.run.id,
        number=work.run.number,
        revision=work.run.revision,
        attempt=max(attempts),
        start_time=_start_time(work, known),
        completion_time=format_time(completion_time(work)) if outcome else None,
        rerun_token=work.order.spec.rerun_token,
        base=_base(work),
        outcome=outcome,
        output=work.order.output_uri if outcome == "Complete" else None,
    )


def _start_time(work: Work, known: Run | None) -> str | None:
    """When the run's first order was made, which is now where there is none yet; None while the
    run waits for its model."""
    if work.run.wait is not None:
        return None
    if known is not None and known.start_time is not None:
        return known.start_time
    made = [o.created for o in work.observed.orders if o.run == work.run.id and o.created]
    return format_time(min(made, default=work.now))


def _base(work: Work) -> RunBase | None:
    base = work.order.base
    if base is None:
        return None
    return make(RunBase, job=base.job, run=base.run, uri=base.uri, digest=base.digest)


def _results(work: Work, base: FineTuneJobStatus) -> dict[str, Any]:
    """What the stages said so far; what status knows stays where the pods are gone."""
    found: dict[str, Any] = {"usage": _usage(work, base), "startup": _startup(work, base)}
    if work.prepared is not None:
        found["prepared"] = figures.prepared_status(work.prepared)
    progress, read_at = work.observed.progress, work.observed.progress_time
    if progress is not None and read_at is not None and progress.run == work.run.id:
        found["progress"] = figures.progress_status(progress, read_at)
        if progress.latest_checkpoint or progress.best_checkpoint:
            found["checkpoints"] = Checkpoints(
                latest=progress.latest_checkpoint, best=progress.best_checkpoint
            )
    if work.trained is not None:
        known = found.get("progress") or base.progress
        done = base.progress is not None and base.progress.stage == "Done"
        last = base.progress if done else figures.final_progress(known, work.trained, work.now)
        found["progress"] = last
        found["evaluation"] = figures.evaluation(work.trained) or base.evaluation
        found["parameters"] = ParameterStatus(
            trainable=work.trained.trainable_parameters, total=work.trained.total_parameters
        )
        if work.trained.checkpoint:
            old = found.get("checkpoints") or base.checkpoints or Checkpoints()
            found["checkpoints"] = old.model_copy(update={"best": work.trained.checkpoint})
    if work.published is not None:
        found["output"] = figures.output_status(work.published)
    return found


def _startup(work: Work, base: FineTuneJobStatus) -> StartupStatus | None:
    """As it was told first."""
    if base.startup is not None:
        return base.startup
    run, progress, trained = work.run, work.observed.progress, work.trained
    told = progress.startup if progress and progress.run == run.id else None
    return startup(
        parse_time(base.run.start_time) if base.run else None,
        work.order.spec.compute.nodes,
        work.observed.job("train", run.id, run.revision),
        work.observed.pods_of("train", run.id, run.revision),
        told or (trained.startup if trained else None),
    )


def _usage(work: Work, base: FineTuneJobStatus) -> Any:
    run = work.run
    ran = base.progress is not None or base.restarts > 0 or work.done("train")
    ran = ran or any(c.type == "Running" and c.status == "True" for c in base.conditions)
    gone = [p for p in work.observed.gone if p.role == "train" and p.run == run.id]
    progress = work.observed.progress
    return usage(
        base.usage,
        work.order.spec.compute,
        [*work.observed.pods_of("train", run.id), *gone],
        work.observed.job("train", run.id, run.revision),
        started=ran,
        progress=progress if progress and progress.run == run.id else None,
        trained=work.trained,
        now=work.now,
    )
