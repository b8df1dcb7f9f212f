"""When the state of a step is saved: every decision about checkpoints between two steps."""

from __future__ import annotations

from typing import NamedTuple


class StepStatus(NamedTuple):
    """What the decision depends on, identical on all ranks.

    ``stop``, ``due_by_time`` and ``upload_failed`` are replies of ``world.Agreement``, which lag
    one step.
    """

    step: int
    """Steps done."""
    total: int
    """Steps of the run."""
    evaluation_due: bool
    due_by_step: bool
    due_by_time: bool
    stop: bool
    """Whether any rank was asked to stop, or to let another node join."""
    upload_failed: bool
    """Whether any rank failed to upload its part of the checkpoint."""
    since_save: int
    """Steps since a checkpoint was last begun."""


class CheckpointAction(NamedTuple):
    """What to do, in this order."""

    abandon_upload: bool
    """Abandon the failed upload, and train on."""
    evaluate: bool
    """Evaluate, which saves the step too."""
    save: bool
    force: bool
    """Save even where skipped steps make the weights doubtful, and where storage failed repeatedly:
    no later step can."""
    stop: bool
    """Wait for the checkpoint, and end the attempt."""


def decide_checkpoint(status: StepStatus) -> CheckpointAction:
    """The action after a step.

    Replies lag one step: if a checkpoint was begun in the last step (``since_save`` is 1), they
    describe the state before it, and are ignored.
    """
    last = status.stop or status.step == status.total
    replies_are_new = status.since_save > 1
    evaluate = status.evaluation_due or status.step == status.total
    due = status.stop or status.due_by_step or (status.due_by_time and replies_are_new)
    return CheckpointAction(
        abandon_upload=status.upload_failed and replies_are_new and not last,
        evaluate=evaluate,
        save=due and not evaluate,
        force=last,
        stop=status.stop and status.step < status.total,
    )
