"""Too many skipped steps in a row: the run goes back to a checkpoint from before them.

    guard ──► row of skipped steps ──► HEAD: the rollback, without the checkpoints behind it
                                            └──► commit, plan without their samples

HEAD alone knows of rollbacks. The write that notes one takes the checkpoints behind it away, so
whenever an attempt dies, the next one leaves out the same samples and counts as many.
"""

from __future__ import annotations

from finetune_trainer.engine.guard import Skipped
from finetune_trainer.failures import Diverged
from finetune_trainer.prepared.origins import in_words, origins_of
from finetune_trainer.storage.run_head import Rollback
from finetune_trainer.train.session import Session
from finetune_trainer.train.state import LoopState


class TooManySkipped(Exception):
    """The guard has skipped more steps in a row than the manifest allows."""

    def __init__(self, streak: list[Skipped]) -> None:
        super().__init__(streak)
        self.streak = streak


def read_guard(session: Session, state: LoopState) -> None:
    """Learn which steps were skipped; waits for the device.

    Raises:
        TooManySkipped: on all ranks together.
    """
    skipped = session.guard.skipped()
    streak = state.note_skipped(skipped)
    state.guard = session.guard.statistics
    session.telemetry.skipped_steps.inc(len(skipped))
    if len(streak) > session.spec.training.guard.max_skipped_steps:
        raise TooManySkipped(streak)


def roll_back(session: Session, state: LoopState, streak: list[Skipped]) -> LoopState:
    """The state of the newest checkpoint from before a row of skipped steps, and the plan without
    their samples.

    Raises:
        Diverged: where the run has gone back often enough, has no such checkpoint, or would have no
            samples left.
    """
    checkpointer, steps = session.checkpointer, [skipped.step for skipped in streak]
    before, most = len(checkpointer.head.rollbacks), session.spec.training.guard.max_rollbacks
    positions = session.plan.drawn(steps).tolist()
    reason, why, remedy = diagnose(streak, in_words(origins_of(session.data, "train", positions)))
    if before >= most:
        often = f"rollbacks before: {before}; training.guard.maxRollbacks: {most}"
        raise Diverged(reason, f"{why} ({often}). {remedy}")
    gone = session.plan.drawn([*checkpointer.head.left_out, *steps])
    if len(gone) == len(session.plan.lengths):
        raise Diverged(reason, f"{why}, and without their samples none would be left. {remedy}")
    rollback = Rollback(
        attempt=checkpointer.head.attempt, skipped=steps, skipped_steps=state.skipped_steps
    )
    found = checkpointer.rewind(session.loss.model, session.optimizers, rollback)
    if found is None:
        raise Diverged(reason, f"{why}, and there is no checkpoint from before. {remedy}")
    session.telemetry.rollbacks.inc()
    if session.world.is_main:
        print(f"{why}: back to step {found.step}, without the samples of these steps", flush=True)
    return with_rollbacks(session, found)


def with_rollbacks(session: Session, state: LoopState) -> LoopState:
    """The state of a checkpoint, or of the beginning, in a run that has gone back since as HEAD
    says; the plan is set to that."""
    head = session.checkpointer.head
    session.plan.leave_out(head.left_out)
    state.skipped_steps = max([state.skipped_steps, *(r.skipped_steps for r in head.rollbacks)])
    return state


def diagnose(streak: list[Skipped], samples: str) -> tuple[str, str, str]:
    """Reason, cause and remedy of a row of skipped steps; ``samples`` names some of theirs."""
    steps, spikes = f"step {streak[0].step}", sum(skipped.spike for skipped in streak)
    if len(streak) > 1:
        steps = f"steps {streak[0].step} to {streak[-1].step}"
    knobs = "Lower training.learningRate, raise training.warmupRatio"
    if spikes == len(streak):
        reason, what = "LossSpike", "a loss far above those before (training.guard.spikeDeviations)"
        knobs += " or training.guard.spikeDeviations"
    else:
        reason, what = "LossNotFinite", "a loss or gradient that was no finite number"
        if spikes:
            what += f" ({spikes} of them a spike instead)"
    remedy = (
        f"{knobs}, or look for damaged records among those of these steps: {samples} (prepared"
        " samples, counted from 1 in the order of the data). The checkpoints before are kept"
    )
    return reason, f"{steps} had {what}", remedy
