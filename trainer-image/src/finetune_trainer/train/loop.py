"""The training loop, from top to bottom.

    plan → feed → step → (log) → (evaluate → commit) … → test → result

Everything it uses is built in ``session``; what it must not forget lives in ``LoopState``, which
each checkpoint carries.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from finetune_api.results import TrainSummary
from finetune_trainer.engine.compilation import compilations
from finetune_trainer.engine.packing.feed import Feed
from finetune_trainer.engine.planning.schedule import (
    evaluation_steps,
    learning_rate,
    log_interval,
    steps_of,
)
from finetune_trainer.engine.world import Agreement
from finetune_trainer.evaluate.measure import overall
from finetune_trainer.evaluate.scores import GENERATED, better
from finetune_trainer.failures import Interrupted
from finetune_trainer.storage.runfiles import CurvePoint, ValidationPoint
from finetune_trainer.train.clock import Clock
from finetune_trainer.train.final import measure_base, test_and_write_result
from finetune_trainer.train.garbage import collected_between_steps
from finetune_trainer.train.rollback import TooManySkipped, read_guard, roll_back, with_rollbacks
from finetune_trainer.train.session import Session
from finetune_trainer.train.state import LoopState
from finetune_trainer.train.step import optimizer_step
from finetune_trainer.train.stopping import raise_if_stopping


def train(session: Session, stop_requested: Callable[[], bool]) -> TrainSummary:
    """Train to the end, or save and stop when asked to.

    Raises:
        Interrupted: after a stop was asked for and the state was committed.
        Diverged: where the loss is no longer a number.
        Fenced: where a newer attempt has taken the run.
        StorageUnavailable: where storage took none of several checkpoints in a row, or not the
        last.
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
    baseline = measure_base(session)
    session.telemetry.reached("baseline")

    clock = Clock(session.work, session.peak)
    session.telemetry.say(stage="Training")
    while True:
        try:
            with collected_between_steps() as after_step:
                take_steps(session, state, total, clock, stop_requested, after_step)
            break
        except TooManySkipped as skipped:
            state = roll_back(session, state, skipped.streak)
    return test_and_write_result(session, state, baseline)


def take_steps(
    session: Session, state: LoopState, total: int, clock: Clock,
    stop_requested: Callable[[], bool], after_step: Callable[[int], None],
) -> None:  # fmt: skip
    """Train from the state's step to the end, to where early stopping ends it, or to a stop.

    Raises:
        TooManySkipped: on all ranks together.
        Interrupted: as ``train``.
    """
    spec, world = session.spec, session.world
    evaluate_at = evaluation_steps(spec, total)
    log_every = log_interval(total)
    agreement = Agreement(world)
    session.guard.resume(state.guard)
    rollbacks = len(session.checkpointer.head.rollbacks)
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
            sums, norm = optimizer_step(session, batch, rate)
            state.advance(sums, batch.plan.tokens)
            clock.step(session, batch)
            after_step(state.step)

            if state.step % log_every == 0 or state.step == total:
                log(session, state, rate, norm, clock)
            by_step = session.checkpointer.due_by_step(state.step)
            stop, late, failed = agreement.exchange(
                stop_requested(), session.checkpointer.due_by_time(clock.since_checkpoint()),
                session.checkpointer.failed,
            )  # fmt: skip
            # The answer to a wish comes a step later: one that was met since is old, and what has
            # failed may be another checkpoint than the one on its way.
            fresh, last = clock.steps_since_checkpoint > 1, stop or state.step == total
            if failed and fresh and not last:
                session.checkpointer.abandon_failed_upload()
            log_checkpoints(session)
            if state.step in evaluate_at or state.step == total:
                evaluate(session, state, clock, force=last)
            elif stop or (late and fresh) or by_step:
                commit(session, state, clock, force=stop)
            if stop and state.step < total:
                agreement.settle()
                session.checkpointer.settle()
                raise Interrupted(
                    "Interrupted", f"stopped as asked; step {state.step} of {total} is saved"
                )
    agreement.settle()


def log(session: Session, state: LoopState, rate: float, norm: Tensor, clock: Clock) -> None:
    """Add a point to the learning curve and tell it.

    Raises:
        TooManySkipped: on all ranks together.
    """
    read_guard(session, state)
    figures = state.take_figures(session.world.sum)
    if figures is None:  # no step was taken: there is nothing to tell
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
        training_seconds=clock.elapsed(),
    )  # fmt: skip
    if session.world.is_main:
        where = f"step {state.step}/{total}" + (f" ({stage})" if stage else "")
        print(f"{where} loss {loss:.4f} lr {rate:.3g}{compiled}", flush=True)


def evaluate(session: Session, state: LoopState, clock: Clock, *, force: bool) -> None:
    """Measure the validation sets, watch for early stopping, and commit the step (``force``: as
    ``commit`` has it)."""
    spec, telemetry = session.spec, session.telemetry
    began = time.perf_counter()
    telemetry.say(stage="Evaluating", step=state.step)
    watched = [spec.checkpoint.metric]
    if spec.training.early_stopping is not None:
        watched.append(spec.training.early_stopping.metric)
    only = [m for m in watched if m in GENERATED]
    try:
        results = session.evaluator.sets(
            "validation", session.metrics_of_sets("validation", only or ["Loss"])
        )
    except Interrupted:  # who goes on from this checkpoint measures it
        commit(session, state, clock, force=True)
        session.checkpointer.settle()
        raise
    if results:
        metrics = overall(results)
        state.validation.append(
            ValidationPoint(
                step=state.step, sets={r.name: r.metrics for r in results}, overall=metrics
            )
        )
        for result in results:
            telemetry.validation_loss.labels(result.name).set(result.metrics["Loss"])
        watch_early_stopping(session, state, metrics)
    clock.count(session, "evaluation", time.perf_counter() - began)
    commit(session, state, clock, force=force or state.stopped_early)


def was_measured(session: Session, state: LoopState) -> bool:
    """Whether nothing is left to measure of the step that a run goes on from: it may have been
    stopped in the middle of it."""
    there_are = session.data.set_names("validation")
    return not there_are or any(point.step == state.step for point in state.validation)


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


def commit(session: Session, state: LoopState, clock: Clock, *, force: bool) -> None:
    """Have the state of this step made the newest checkpoint of the run.

    While steps are being skipped the weights are in doubt: the checkpoint is left to a later step,
    so that those from before are not pruned, unless it is the last chance (``force``). That one is
    tried too where storage took none of several before it.

    Raises:
        TooManySkipped: on all ranks together.
        StorageUnavailable, Fenced: as ``CheckpointManager.commit``, of the checkpoint before.
    """
    read_guard(session, state)
    if state.skipped and not force:
        return
    began = time.perf_counter()
    telemetry = session.telemetry
    telemetry.say(stage="Saving", step=state.step)
    state.gather(session.world.sum)
    session.checkpointer.save(session.loss.model, session.optimizers, state, last=force)
    log_checkpoints(session)
    clock.committed()
    clock.count(session, "checkpoint", time.perf_counter() - began)
    telemetry.say(stage="Training")


def log_checkpoints(session: Session) -> None:
    """Say which commits there are, when another has become real, and how many were given up."""
    checkpointer, telemetry = session.checkpointer, session.telemetry
    if checkpointer.settled():
        telemetry.say(
            latest_checkpoint=checkpointer.latest_uri, best_checkpoint=checkpointer.best_uri
        )
    if more := checkpointer.abandoned - telemetry.progress.checkpoints_abandoned:
        telemetry.checkpoints_abandoned.inc(more)
        telemetry.say(checkpoints_abandoned=checkpointer.abandoned)
