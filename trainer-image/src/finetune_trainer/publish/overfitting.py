"""Overfitting, read from the curves: the validation loss rises while the training loss falls."""

from __future__ import annotations

import math
from typing import Final

from finetune_api.base import Record
from finetune_trainer.storage.runfiles import RunResult

_RISE: Final = 0.05
"""Rise of the validation loss above its lowest value, as a share of it, that counts."""
_POINTS: Final = 3
"""With fewer evaluations a rise may be chance."""


class Overfitting(Record):
    """The validation loss over the run, beside the training loss."""

    best_step: int
    """Step with the lowest validation loss."""
    best_loss: float
    """That loss, in nats per supervised token (or sample, of a classifier)."""
    last_loss: float
    """The validation loss at the last evaluation."""
    training_loss: float
    """The training loss at the last evaluation."""
    warning: str | None = None
    """In words, if the run was longer than the data can bear."""

    @property
    def gap(self) -> float:
        """Validation loss minus training loss, at the last evaluation."""
        return self.last_loss - self.training_loss


def overfitting(result: RunResult) -> Overfitting | None:
    """Compare the curves of a run; None: there are no finite losses of both kinds."""
    points = [
        (point.step, point.overall["Loss"])
        for point in result.validation
        if math.isfinite(point.overall.get("Loss", math.nan))
    ]
    curve = [(point.step, point.loss) for point in result.curve if math.isfinite(point.loss)]
    if not points or not curve:
        return None
    best_step, best = min(points, key=lambda point: point[1])
    last_step, last = points[-1]
    trained = min(curve, key=lambda point: abs(point[0] - last_step))[1]
    at_best = min(curve, key=lambda point: abs(point[0] - best_step))[1]
    rises = last > best * (1 + _RISE) and trained < at_best and len(points) >= _POINTS
    text = (
        f"the validation loss rose from {best:.4g} (step {best_step:,}) to {last:.4g} (step"
        f" {last_step:,}), while the training loss fell from {at_best:.4g} to {trained:.4g}."
        f" Published is the checkpoint of step {result.summary.checkpoint_step or 0:,}. Fewer"
        " epochs, training.earlyStopping, a lower learning rate, more dropout or more data help"
    )
    return Overfitting(
        best_step=best_step,
        best_loss=best,
        last_loss=last,
        training_loss=trained,
        warning=text if rises else None,
    )
