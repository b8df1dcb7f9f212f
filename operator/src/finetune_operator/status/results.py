"""Results that the stages of a run have reported so far. Results in the stored status are kept
after the pods that reported them are gone."""

from __future__ import annotations

from typing import Any

from finetune_api.status import (
    Checkpoints,
    FineTuneJobStatus,
    ParameterStatus,
    StartupStatus,
    Usage,
)
from finetune_api.time_use import TimeUse
from finetune_operator.decision.plan import State
from finetune_operator.decision.run_view import RunView
from finetune_operator.decision.stages import GANG
from finetune_operator.status import figures
from finetune_operator.status.models import make
from finetune_operator.status.startup import startup
from finetune_operator.status.usage import Gang, usage
from finetune_operator.world.objects import parse_time
from finetune_operator.world.pods import PodView


def results(view: RunView, stored: FineTuneJobStatus, state: State) -> dict[str, Any]:
    """Fields of status that the stages fill, by Python name.

    Args:
        stored: this run's stored status, empty when the run begins.
        state: state of the run.
    """
    spent = _usage(view, stored, state)
    found: dict[str, Any] = {"usage": spent, "startup": _startup(view, stored)}
    if view.prepared is not None:
        found["prepared"] = figures.prepared_status(view.prepared)
    found |= _from_progress(view, stored)
    found |= _from_training(view, stored, found)
    if view.published is not None:
        found["output"] = figures.output_status(view.published)
        found["main_result"] = figures.main_result(view.published.main_result)
        with_verdicts = figures.evaluation(view.published.scores)
        found["evaluation"] = with_verdicts or found.get("evaluation") or stored.evaluation
    return found


def _from_progress(view: RunView, stored: FineTuneJobStatus) -> dict[str, Any]:
    progress, read_at = view.progress, view.observed.progress_time
    if progress is None or read_at is None:
        return {}
    planned = view.prepared.total_steps if view.prepared else 0
    found: dict[str, Any] = {
        "progress": figures.progress_status(progress, read_at, stored.progress, planned)
    }
    if progress.latest_checkpoint or progress.best_checkpoint:
        found["checkpoints"] = make(
            Checkpoints,
            latest=progress.latest_checkpoint,
            best=progress.best_checkpoint,
            save_seconds=view.save_seconds,
        )
    return found


def _from_training(
    view: RunView, stored: FineTuneJobStatus, polled: dict[str, Any]
) -> dict[str, Any]:
    """Results that the gang reported at its end. ``polled`` comes from its ``/progress``, which may
    lack the last steps."""
    trained = view.trained
    if trained is None:
        return {}
    newest = polled.get("progress") or stored.progress
    done = stored.progress is not None and stored.progress.stage == "Done"
    found: dict[str, Any] = {
        "progress": stored.progress if done else figures.final_progress(newest, trained, view.now),
        "evaluation": figures.evaluation(trained.scores) or stored.evaluation,
        "parameters": ParameterStatus(
            trainable=trained.trainable_parameters, total=trained.total_parameters
        ),
    }
    if trained.checkpoint:
        checkpoints = polled.get("checkpoints") or stored.checkpoints or Checkpoints()
        found["checkpoints"] = checkpoints.model_copy(update={"best": trained.checkpoint})
    return found


def _startup(view: RunView, stored: FineTuneJobStatus) -> StartupStatus | None:
    """Startup times; once status has them they are kept."""
    if stored.startup is not None:
        return stored.startup
    run, progress, trained = view.run, view.progress, view.trained
    reported = progress.startup if progress else None
    return startup(
        parse_time(stored.run.start_time) if stored.run else None,
        view.run_spec.spec.compute.effective_min_nodes,
        view.observed.job(GANG, run.id, run.revision),
        view.observed.pods_of(GANG, run.id, run.revision),
        reported or (trained.startup if trained else None),
    )


def _usage(view: RunView, stored: FineTuneJobStatus, state: State) -> Usage:
    run, job = view.run, view.observed.job(GANG, view.run.id, view.run.revision)
    waits = view.queue_wait
    since = parse_time(waits.since) if waits else job.created if job else None
    report, over = _time_use(view)
    return usage(
        stored.usage or Usage(),
        Gang(
            view.run_spec.spec.compute,
            view.observed.pods_of(GANG, run.id),
            _gone(view),
            since,
            waits=view.stage == GANG and state == "Active",
        ),
        report,
        over=over,
        done=view.done(GANG),
        ended=state != "Active",
        now=view.now,
    )


def _gone(view: RunView) -> list[PodView]:
    return [p for p in view.observed.gone if p.role == GANG and p.run == view.run.id]


def _time_use(view: RunView) -> tuple[TimeUse | None, bool]:
    """The trainer's newest account of the run's time, and whether its attempt has ended with it."""
    found = [(view.progress.time if view.progress else None, False)]
    found += [
        (each.trained.time if each.trained else each.time, True) for each in view.terminations
    ]
    accounts = [(account, over) for account, over in found if account is not None]
    return max(accounts, key=lambda item: item[0].until, default=(None, False))
