"""Rollback: after too many consecutive skipped steps, resume from a checkpoint before them.

    guard ──► consecutive skipped steps ──► HEAD: record the rollback, drop the later checkpoints
                                              └──► restore a checkpoint; plan without their samples

Rollbacks are stored in HEAD only. One write records a rollback and removes the later checkpoints,
so that after a crash at any point the next attempt leaves out the same samples and has the same
count of rollbacks.
"""

from __future__ import annotations

from finetune_trainer.engine.guard import Skipped
from finetune_trainer.failures import Diverged
from finetune_trainer.prepared.origins import in_words, origins_of
from finetune_trainer.storage.run_head import Rollback
from finetune_trainer.train.session import Session
from finetune_trainer.train.state import LoopState


class TooManySkipped(Exception):
    """The guard skipped more consecutive steps than the manifest allows."""

    def __init__(self, streak: list[Skipped]) -> None:
        super().__init__(streak)
        self.streak = streak


def read_guard(session: Session, state: LoopState) -> None:
    """Read which steps were skipped and update state and telemetry. Synchronizes the device.

    Raises:
        TooManySkipped: on all ranks.
    """
    skipped = session.guard.skipped()
    streak = state.note_skipped(skipped)
    state.guard = session.guard.statistics
    session.telemetry.skipped_steps.inc(len(skipped))
    if len(streak) > session.spec.training.guard.max_skipped_steps:
        raise TooManySkipped(streak)


def roll_back(session: Session, state: LoopState, streak: list[Skipped]) -> LoopState:
    """Restore the newest checkpoint before the skipped steps, and leave their samples out of the
    plan.

    Returns:
        The state of that checkpoint.

    Raises:
        Diverged: if the rollbacks are used up, no such checkpoint exists, or no samples would
            remain.
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
        raise Diverged(reason, f"{why}, and there is no earlier checkpoint. {remedy}")
    session.telemetry.rollbacks.inc()
    if session.world.is_main:
        print(f"{why}: back to step {found.step}, without the samples of these steps", flush=True)
    return with_rollbacks(session, found)


def with_rollbacks(session: Session, state: LoopState) -> LoopState:
    """Apply the rollbacks recorded in HEAD to the plan and to a state (of a checkpoint or of the
    start); return the state."""
    head = session.checkpointer.head
    session.plan.leave_out(head.left_out)
    state.skipped_steps = max([state.skipped_steps, *(r.skipped_steps for r in head.rollbacks)])
    return state


def diagnose(streak: list[Skipped], samples: str) -> tuple[str, str, str]:
    """Return reason, cause and remedy of consecutive skipped steps. ``samples`` names some of their
    samples."""
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
        " samples, counted from 1 in the order of the data). Earlier checkpoints are kept"
    )
    return reason, f"{steps} had {what}", remedy
