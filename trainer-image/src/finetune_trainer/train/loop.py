"""The training loop, from top to bottom.

    plan → feed → step → (log) → (evaluate → commit) … → test → result

Everything it uses is built in ``session``; what it must not forget lives in ``LoopState``, which
each commit carries.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Final

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from finetune_api.results import TrainSummary
from finetune_trainer.engine.feed import Feed, StepTensors
from finetune_trainer.engine.gang import Agreement
from finetune_trainer.engine.packed import row_context
from finetune_trainer.engine.schedule import evaluation_steps, learning_rate, log_interval, steps_of
from finetune_trainer.evaluate.measure import overall
from finetune_trainer.evaluate.scores import GENERATED, better
from finetune_trainer.failures import Diverged, Interrupted
from finetune_trainer.storage.runfiles import CurvePoint, ValidationPoint
from finetune_trainer.train.final import measure_untuned, test_and_write_result
from finetune_trainer.train.session import Session
from finetune_trainer.train.state import LoopState

_TELLING_SECONDS: Final = 3.0


def train(session: Session, stop_requested: Callable[[], bool]) -> TrainSummary:
    """Train to the end, or save and stop when asked to.

    Raises:
        Interrupted: after a stop was asked for and the state was committed.
        Diverged: where the loss is no longer a number.
        Fenced: where a newer attempt has taken the run.
    """
    spec, gang, telemetry = session.spec, session.gang, session.telemetry
    total = steps_of(spec, len(session.plan.lengths))
    evaluate_at = evaluation_steps(spec, total)
    log_every = log_interval(total)

    state = session.checkpoints.restore(session.loss.model, session.optimizer) or LoopState()
    telemetry.say(total_steps=total, step=state.step)
    telemetry.total_steps.set(total)
    with releasing(session, stop_requested):
        baseline = measure_untuned(session)

    clock = Clock()
    agreement = Agreement(gang)
    telemetry.say(stage="Training")
    with Feed(
        session.plan, lambda positions: session.data.samples("train", positions),
        rank=gang.rank, start=state.step, end=total, device=gang.device,
    ) as feed:  # fmt: skip
        for batch in feed:
            if state.stopped_early:
                break
            rate = learning_rate(spec, total, state.step)
            losses, norm = optimizer_step(session, batch, rate)
            state.advance(losses, batch.plan)
            clock.step(session, batch)

            if state.step % log_every == 0 or state.step == total:
                log(session, state, rate, norm, clock)
            by_step = session.checkpoints.due_by_step(state.step)
            stop, late, failed = agreement.exchange(
                stop_requested(), session.checkpoints.due_by_time(clock.since_commit()),
                session.checkpoints.failed,
            )  # fmt: skip
            if failed:
                session.checkpoints.settle()
            tell_commits(session)
            if state.step in evaluate_at or state.step == total:
                evaluate(session, state, clock)
            # The answer to a wish comes a step later: one that was met since is old.
            elif stop or (late and clock.steps_since_commit > 1) or by_step:
                commit(session, state, clock)
            if stop and state.step < total:
                agreement.settle()
                session.checkpoints.settle()
                end_attempt(session, stop_requested)
                raise Interrupted(
                    "Interrupted", f"stopped as asked; step {state.step} of {total} is saved"
                )
    agreement.settle()
    with releasing(session, stop_requested):
        return test_and_write_result(session, state, baseline)


def optimizer_step(session: Session, batch: StepTensors, rate: float) -> tuple[Tensor, Tensor]:
    """One step of the optimizer on a global batch.

    Returns:
        This rank's part of the batch's loss per supervised token, then of the summed losses of
        each source (float64, on the device, shape [1 + sources]), and the norm of the gradient
        before clipping. Neither has been waited for.
    """
    gang = session.gang
    local = torch.zeros(1 + len(batch.plan.by_source), dtype=torch.float64, device=gang.device)
    for i, row in enumerate(batch.rows):
        last = i == len(batch.rows) - 1
        with _synchronised(session, last), row_context(row.layout):
            with gang.autocast():
                losses = session.module(row)
            # DDP averages over ranks: the size of the gang makes the average a sum.
            share = losses.sum() / batch.plan.supervised
            (share * gang.size).backward()
        local[0] += share.detach()
        if row.labels.numel():
            local[1:].index_add_(0, row.sources, losses.detach().double())
    limit = float(session.spec.training.max_grad_norm) or float("inf")
    norm = torch.nn.utils.clip_grad_norm_(session.trained, limit)
    # A gradient that is no number makes the loss one that is none: it is noticed with the loss,
    # before a commit, and costs no synchronisation.
    local += norm * 0.0
    for group in session.optimizer.param_groups:
        group["lr"] = rate
    session.optimizer.step()
    session.optimizer.zero_grad(set_to_none=True)
    return local, norm


def _synchronised(session: Session, last: bool) -> AbstractContextManager[None]:
    """Gradients are exchanged once a step, with its last row."""
    if isinstance(session.module, DistributedDataParallel) and not last:
        return session.module.no_sync()
    return nullcontext()


def end_attempt(session: Session, stop_requested: Callable[[], bool]) -> None:
    """Release the run where the whole gang was told to stop (suspended, say).

    Where only some of its pods were told, the gang has lost them to something else: the state is
    saved, but the next attempt counts as a restart. Kubelets tell their pods within a second or
    so of each other.
    """
    deadline = time.monotonic() + _TELLING_SECONDS
    while not stop_requested() and time.monotonic() < deadline:
        time.sleep(0.05)
    if all(session.gang.together(stop_requested)):
        session.checkpoints.release()


@contextmanager
def releasing(session: Session, stop_requested: Callable[[], bool]) -> Iterator[None]:
    """End the attempt in good order where a measurement was interrupted (nothing is unsaved)."""
    session.evaluator.stop_requested = stop_requested
    try:
        yield
    except Interrupted:
        end_attempt(session, stop_requested)
        raise
    finally:
        session.evaluator.stop_requested = None


def log(session: Session, state: LoopState, rate: float, norm: Tensor, clock: Clock) -> None:
    """Add a point to the learning curve and tell it.

    Raises:
        Diverged: where the loss or the gradient is not a finite number, on all ranks together.
    """
    loss, by_source = settle_losses(session, state)
    telemetry = session.telemetry
    point = CurvePoint(
        step=state.step, loss=loss, learning_rate=rate, gradient_norm=float(norm.item()),
        by_source=by_source,
    )  # fmt: skip
    state.curve.append(point)
    total = telemetry.progress.total_steps
    remaining = clock.remaining(total - state.step)
    telemetry.loss.set(loss)
    for name, value in by_source.items():
        telemetry.source_loss.labels(name).set(value)
    telemetry.learning_rate.set(rate)
    telemetry.gradient_norm.set(point.gradient_norm)
    telemetry.tokens_per_second.set(clock.tokens_per_second())
    if session.gang.device.type == "cuda":
        telemetry.set_gpu_memory(torch.cuda.max_memory_allocated())
    telemetry.say(
        step=state.step, loss=loss, by_source=by_source, learning_rate=rate,
        epoch=session.plan.visited(state.step) / len(session.plan.lengths),
        remaining_seconds=remaining,
        tokens_per_second=clock.tokens_per_second(), training_seconds=clock.elapsed(),
    )  # fmt: skip
    if session.gang.first:
        print(f"step {state.step}/{total} loss {loss:.4f} lr {rate:.3g}", flush=True)


def settle_losses(session: Session, state: LoopState) -> tuple[float, dict[str, float]]:
    """Mean loss over the steps since the last log point, over the gang, and that of each source
    where there are several.

    Raises:
        Diverged: where it is not a finite number; every rank sees the same sum.
    """
    loss, parts = state.take_losses(session.gang.sum)
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise Diverged(
            "LossNotFinite",
            f"the training loss or its gradient became {loss} between steps {state.logged} and"
            f" {state.step}."
            " Lower training.learningRate, raise training.warmupRatio, or look for damaged"
            " records in the data report; the commits before are kept",
        )
    state.logged = state.step
    if len(session.sources) == 1:
        return loss, {}
    named = zip(session.sources, parts, strict=False)
    return loss, {name: value for name, value in named if value is not None}


def evaluate(session: Session, state: LoopState, clock: Clock) -> None:
    """Measure the validation sets, decide whether this is the best step, and commit it."""
    spec, telemetry = session.spec, session.telemetry
    began = time.perf_counter()
    telemetry.say(stage="Evaluating", step=state.step)
    watched = [spec.checkpoint.metric]
    if spec.training.early_stopping is not None:
        watched.append(spec.training.early_stopping.metric)
    only = [m for m in watched if m in GENERATED]
    results = session.evaluator.sets(
        "validation", session.metrics_of_sets("validation", only or ["Loss"])
    )
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
    commit(session, state, clock)


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


def commit(session: Session, state: LoopState, clock: Clock) -> None:
    """Have the state of this step made the newest commit of the run."""
    began = time.perf_counter()
    telemetry = session.telemetry
    telemetry.say(stage="Saving", step=state.step)
    state.check_finite(session.gang.sum)
    session.checkpoints.commit(session.loss.model, session.optimizer, state)
    clock.committed()
    clock.count(session, "checkpoint", time.perf_counter() - began)
    telemetry.say(stage="Training")


def tell_commits(session: Session) -> None:
    """Say which commits there are, when another has become real."""
    if session.checkpoints.settled():
        session.telemetry.say(
            latest_checkpoint=session.checkpoints.latest_uri,
            best_checkpoint=session.checkpoints.best_uri,
        )


class Clock:
    """Where the wall time of this attempt goes."""

    def __init__(self) -> None:
        self._began = self._mark = self._commit = time.perf_counter()
        self._steps = 0
        self.steps_since_commit = 0
        self._tokens = 0
        self._busy = 0.0

    def step(self, session: Session, batch: StepTensors) -> None:
        """A step has ended."""
        now = time.perf_counter()
        took, self._mark = now - self._mark, now
        self._steps += 1
        self.steps_since_commit += 1
        self._tokens += batch.plan.tokens
        self._busy += took
        telemetry = session.telemetry
        telemetry.step.set(batch.plan.number + 1)
        telemetry.tokens.inc(batch.plan.tokens)
        telemetry.samples.inc(len(batch.plan.samples))
        telemetry.step_time.observe(took)
        telemetry.seconds.labels("data_wait").inc(batch.waited)
        telemetry.seconds.labels("compute").inc(max(0.0, took - batch.waited))

    def count(self, session: Session, part: str, seconds: float) -> None:
        """Time that is no step's."""
        session.telemetry.seconds.labels(part).inc(seconds)
        self._mark = time.perf_counter()

    def committed(self) -> None:
        self._commit = time.perf_counter()
        self.steps_since_commit = 0

    def since_commit(self) -> float:
        return time.perf_counter() - self._commit

    def elapsed(self) -> float:
        return time.perf_counter() - self._began

    def tokens_per_second(self) -> float:
        return self._tokens / self._busy if self._busy else 0.0

    def remaining(self, steps: int) -> float:
        """Expected seconds for so many steps, evaluation and commits in proportion."""
        return self.elapsed() / self._steps * steps if self._steps else 0.0
