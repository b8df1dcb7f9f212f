"""The training loop, from top to bottom.

    plan → feed → step → (log) → (evaluate) → (save checkpoint) … → test → result

``session`` builds everything that the loop uses. ``LoopState`` is what a resumed run needs to know,
and is part of each checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from finetune_api.results import TrainSummary
from finetune_trainer.engine.compilation import compilation_seconds, compilations
from finetune_trainer.engine.packing.feed import Feed
from finetune_trainer.engine.planning.schedule import (
    evaluation_steps,
    learning_rate,
    log_interval,
    steps_of,
)
from finetune_trainer.engine.world import Agreement
from finetune_trainer.evaluate.base_kl import base_kl
from finetune_trainer.evaluate.measure import overall
from finetune_trainer.evaluate.scores import OF_LOSS, better
from finetune_trainer.failures import Interrupted
from finetune_trainer.liveness import stepped
from finetune_trainer.storage.runfiles import CurvePoint, ValidationPoint
from finetune_trainer.supervise.worker_files import grow_requested
from finetune_trainer.train.checkpoint_policy import StepStatus, decide_checkpoint
from finetune_trainer.train.clock import Clock
from finetune_trainer.train.final import measure_base, test_and_write_result
from finetune_trainer.train.garbage import collected_between_steps
from finetune_trainer.train.rollback import TooManySkipped, read_guard, roll_back, with_rollbacks
from finetune_trainer.train.session import Session
from finetune_trainer.train.state import LoopState
from finetune_trainer.train.step import optimizer_step
from finetune_trainer.train.stopping import interrupted, raise_if_stopping
from finetune_trainer.train.suspects import first_visits


def train(session: Session, stop_requested: Callable[[], bool]) -> TrainSummary:
    """Train to the end, or save the state and stop on request.

    Raises:
        Interrupted: when a stop was requested, or another node waits to join, after the state was
            saved.
        Diverged: where the loss stays non-finite or spikes, after the rollbacks that the spec
            allows.
        Fenced: where a newer attempt has claimed the run.
        StorageUnavailable: where storage failed for several checkpoints in a row, or for the last.
    """
    total = steps_of(session.spec, len(session.plan.lengths))
    session.evaluator.stop_requested = stop_requested
    session.telemetry.reached("model")
    found = session.checkpointer.restore(session.loss.model, session.optimizers)
    state = with_rollbacks(session, found or LoopState())
    session.telemetry.reached("restore")
    session.telemetry.say(total_steps=total, step=state.step)
    session.telemetry.total_steps.set(total)
    raise_if_stopping(session.world, stop_requested, "before the first step")
    base = measure_base(session, state.step)
    session.telemetry.reached("baseline")

    clock = Clock(session.work, session.peak)
    session.telemetry.say(stage="Training")
    session.recorder.training()
    while True:
        try:
            with collected_between_steps() as after_step:
                take_steps(session, state, total, clock, stop_requested, after_step)
            break
        except TooManySkipped as skipped:
            with session.recorder.of("load"):
                state = roll_back(session, state, skipped.streak)
    return test_and_write_result(session, state, base)


def take_steps(
    session: Session, state: LoopState, total: int, clock: Clock,
    stop_requested: Callable[[], bool], after_step: Callable[[int], None],
) -> None:  # fmt: skip
    """Train from the state's step to the end, to early stopping, or to a requested stop.

    Raises:
        TooManySkipped: on all ranks together.
        Interrupted: as ``train``.
    """
    spec, world, checkpointer = session.spec, session.world, session.checkpointer
    evaluate_at = evaluation_steps(spec, total)
    log_every = log_interval(total)
    agreement = Agreement(world)
    session.guard.resume(state.guard)
    rollbacks = len(checkpointer.head.rollbacks)
    factor = float(spec.training.guard.rollback_factor) ** rollbacks
    if (state.step in evaluate_at or state.step == total) and not was_measured(session, state):
        evaluate(session, state, clock, force=state.step == total)
    with Feed(
        session.plan, lambda positions: session.data.samples("train", positions),
        rank=world.rank // session.context.size, start=state.step, end=total, device=world.device,
        build=session.build, replay=session.replay,
        expect=lambda positions: session.data.expect("train", positions),
    ) as feed:  # fmt: skip
        for batch in feed:
            if state.stopped_early:
                break
            rate = learning_rate(spec, total, state.step) * factor
            sums, norm, by_sample = optimizer_step(session, batch, rate)
            visits = first_visits(session.plan, batch.plan, by_sample)
            state.advance(sums, batch.plan.tokens, visits)
            clock.step(session, batch)
            session.recorder.stepped(
                state.step, compilation_seconds() if spec.training.compile else 0.0
            )
            stepped()
            after_step(state.step)

            if state.step % log_every == 0 or state.step == total:
                log(session, state, rate, norm, clock)
            stop, grow, due_by_time, upload_failed = agreement.exchange(
                stop_requested(), grow_requested(),
                checkpointer.due_by_time(clock.since_checkpoint()), checkpointer.failed,
            )  # fmt: skip
            action = decide_checkpoint(
                StepStatus(
                    state.step, total, state.step in evaluate_at,
                    checkpointer.due_by_step(state.step), due_by_time, stop or grow, upload_failed,
                    clock.steps_since_checkpoint,
                )
            )  # fmt: skip
            if action.abandon_upload:
                checkpointer.abandon_failed_upload()
            log_checkpoints(session)
            if action.evaluate:
                evaluate(session, state, clock, force=action.force)
            elif action.save:
                save_checkpoint(session, state, clock, force=action.force)
            if action.stop:
                agreement.settle()
                checkpointer.settle()
                raise interrupted(stop, f"step {state.step} of {total} is saved")
    agreement.settle()


def log(session: Session, state: LoopState, rate: float, norm: Tensor, clock: Clock) -> None:
    """Add a point to the learning curve and publish it in metrics, progress and log.

    Raises:
        TooManySkipped: on all ranks together.
    """
    read_guard(session, state)
    figures = state.take_figures(session.world.sum)
    if figures is None:  # all steps since the last point were skipped
        return
    loss, anchor_kl = figures.loss, figures.anchor_kl
    balanced = float(session.spec.training.router_aux_loss_coefficient) > 0
    router_loss = figures.router if balanced else None
    by_source: dict[str, float] = {}
    if len(session.sources) > 1:
        named = zip(session.sources, figures.by_source, strict=True)
        by_source = {name: value for name, value in named if value is not None}
    telemetry = session.telemetry
    stage = session.plan.stage(state.step - 1)
    point = CurvePoint(
        step=state.step, data_stage=stage, loss=loss, learning_rate=rate,
        gradient_norm=float(norm.item()), by_source=by_source, anchor_kl=anchor_kl,
        router_loss=router_loss,
    )  # fmt: skip
    state.curve.append(point)
    total = telemetry.progress.total_steps
    remaining = clock.remaining(total - state.step)
    telemetry.loss.set(loss)
    for name, value in by_source.items():
        telemetry.source_loss.labels(name).set(value)
    if anchor_kl is not None:
        telemetry.set_anchor_kl(anchor_kl)
    if router_loss is not None:
        telemetry.set_router_loss(router_loss)
    telemetry.learning_rate.set(rate)
    telemetry.gradient_norm.set(point.gradient_norm)
    telemetry.tokens_per_second.set(clock.tokens_per_second())
    waiting = clock.take_wait_share(session)
    telemetry.data_wait.set(waiting)
    if (utilization := clock.utilization()) is not None:
        telemetry.set_utilization(utilization)
    compiled = ""
    if session.spec.training.compile:
        telemetry.set_compilations(graphs := compilations())
        compiled = f", {graphs} graphs compiled"
    if session.world.device.type == "cuda":
        telemetry.set_gpu_memory(torch.cuda.max_memory_allocated())
    telemetry.say(
        step=state.step, data_stage=stage, loss=loss, by_source=by_source, learning_rate=rate,
        anchor_kl=anchor_kl, router_loss=router_loss,
        epoch=session.plan.visited(state.step) / len(session.plan.lengths),
        remaining_seconds=remaining,
        tokens_per_second=clock.tokens_per_second(), mfu=clock.utilization(),
        data_wait_share=waiting,
    )  # fmt: skip
    if session.world.is_main:
        where = f"step {state.step}/{total}" + (f" ({stage})" if stage else "")
        print(f"{where} loss {loss:.4f} lr {rate:.3g}{compiled}", flush=True)


def evaluate(session: Session, state: LoopState, clock: Clock, *, force: bool) -> None:
    """Measure the validation sets, decide about early stopping, and save the step.

    Args:
        force: as in ``save_checkpoint``.
    """
    with session.recorder.of("evaluation"):
        measure_validation(session, state, clock)
    save_checkpoint(session, state, clock, force=force or state.stopped_early)


def measure_validation(session: Session, state: LoopState, clock: Clock) -> None:
    """Measure the validation sets, and decide about early stopping."""
    spec, telemetry = session.spec, session.telemetry
    began = time.perf_counter()
    telemetry.say(stage="Evaluating", step=state.step)
    watched = [spec.checkpoint.metric]
    if spec.training.early_stopping is not None:
        watched.append(spec.training.early_stopping.metric)
    only = [m for m in watched if m not in OF_LOSS]
    try:
        results = session.evaluator.sets(
            "validation", session.metrics_of_sets("validation", only or ["Loss"])
        )
    except Interrupted:  # the resumed run evaluates this step
        save_checkpoint(session, state, clock, force=True)
        session.checkpointer.settle()
        raise
    if results:
        metrics = overall(results)
        drift = base_kl(session.evaluator, session.base_predictions)
        state.validation.append(
            ValidationPoint(
                step=state.step, sets={r.name: r.metrics for r in results}, overall=metrics,
                base_kl=drift,
            )
        )  # fmt: skip
        if drift is not None:
            telemetry.set_base_kl(drift)
            telemetry.say(base_kl=drift)
        for result in results:
            telemetry.validation_loss.labels(result.name).set(result.metrics["Loss"])
        watch_early_stopping(session, state, metrics)
    clock.count(session, "evaluation", time.perf_counter() - began)


def was_measured(session: Session, state: LoopState) -> bool:
    """Whether the evaluation of the resumed step is complete: the attempt before may have been
    stopped during it."""
    sets = session.data.set_names("validation")
    return not sets or any(point.step == state.step for point in state.validation)


def watch_early_stopping(session: Session, state: LoopState, metrics: dict[str, float]) -> None:
    """Count evaluations without improvement."""
    rule = session.spec.training.early_stopping
    if rule is None:
        return
    value = metrics[rule.metric]
    best = state.watched_best
    if best is None or better(rule.metric, value, best, float(rule.min_delta)):
        state.watched_best, state.without_improvement = value, 0
        return
    state.without_improvement += 1
    state.stopped_early = state.without_improvement >= rule.patience


def save_checkpoint(session: Session, state: LoopState, clock: Clock, *, force: bool) -> None:
    """Begin the checkpoint of this step; training continues while it is uploaded.

    While steps are being skipped the weights are doubtful. No checkpoint is saved then, so that
    older ones are not pruned.

    Args:
        force: save nevertheless, and also after repeated storage failures: no later step can.

    Raises:
        TooManySkipped: on all ranks together.
        StorageUnavailable, Fenced: as ``CheckpointManager.save``, of the checkpoint before.
    """
    read_guard(session, state)
    if state.skipped and not force:
        return
    began = time.perf_counter()
    telemetry = session.telemetry
    telemetry.say(stage="Saving", step=state.step)
    with session.recorder.of("checkpoint"):
        state.gather(session.world.sum)
        session.checkpointer.save(session.loss.model, session.optimizers, state, last=force)
    log_checkpoints(session)
    clock.checkpoint_saved()
    clock.count(session, "checkpoint", time.perf_counter() - began)
    telemetry.say(stage="Training")


def log_checkpoints(session: Session) -> None:
    """Publish the newest and best checkpoint once an upload is complete, and the number of
    abandoned ones."""
    checkpointer, telemetry = session.checkpointer, session.telemetry
    if checkpointer.settled():
        telemetry.say(
            latest_checkpoint=checkpointer.latest_uri,
            best_checkpoint=checkpointer.best_uri,
            save_seconds=checkpointer.longest_save,
        )
    if more := checkpointer.abandoned - telemetry.progress.checkpoints_abandoned:
        telemetry.checkpoints_abandoned.inc(more)
        telemetry.say(checkpoints_abandoned=checkpointer.abandoned)
