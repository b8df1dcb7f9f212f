"""When the state of a step is saved: every decision about checkpoints between two steps."""

from __future__ import annotations

from typing import NamedTuple


class StepFacts(NamedTuple):
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
    """Whether any rank was asked to stop."""
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


def decide_checkpoint(facts: StepFacts) -> CheckpointAction:
    """The action after a step.

    Replies lag one step: if a checkpoint was begun in the last step (``since_save`` is 1), they
    describe the state before it, and are ignored.
    """
    last = facts.stop or facts.step == facts.total
    replies_are_new = facts.since_save > 1
    evaluate = facts.evaluation_due or facts.step == facts.total
    due = facts.stop or facts.due_by_step or (facts.due_by_time and replies_are_new)
    return CheckpointAction(
        abandon_upload=facts.upload_failed and replies_are_new and not last,
        evaluate=evaluate,
        save=due and not evaluate,
        force=last,
        stop=facts.stop and facts.step < facts.total,
    )
