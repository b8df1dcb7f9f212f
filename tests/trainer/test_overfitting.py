"""Overfitting, read from the curves."""

from __future__ import annotations

import pytest

from finetune_api.results import TrainSummary
from finetune_trainer.publish.overfitting import overfitting
from finetune_trainer.storage.runfiles import CurvePoint, RunResult, ValidationPoint


def result(training: list[float], validation: list[float | None]) -> RunResult:
    """One point of each curve every 10 steps; None: no loss."""
    return RunResult(
        summary=TrainSummary(attempt=1, restarts=0, steps=100, checkpoint_step=20),
        lineage=[],
        curve=[
            CurvePoint(step=10 * i, loss=loss, learning_rate=0.1, gradient_norm=1.0)
            for i, loss in enumerate(training, 1)
        ],
        validation=[
            ValidationPoint(step=10 * i, sets={}, overall={} if loss is None else {"Loss": loss})
            for i, loss in enumerate(validation, 1)
        ],
        versions={},
        processes=1,
        device="cpu",
    )


@pytest.mark.parametrize(
    ("training", "validation", "warned"),
    [
        ([3, 2, 1, 0.5], [3, 2, 2.5, 3], True),
        ([3, 2, 1, 0.5], [3, 2, 1.5, 1.2], False),
        ([3, 2, 1, 0.5], [3, 2, 2.05, 2.09], False),  # a small rise
        ([3, 2, 2.5, 2.6], [3, 2, 2.5, 3], False),  # both rise: it diverges
        ([3, 1], [2, 3], False),  # two evaluations show nothing
    ],
)
def test_a_rise_beside_a_fall_is_a_warning(
    training: list[float], validation: list[float | None], warned: bool
) -> None:
    found = overfitting(result(training, validation))
    assert found is not None and (found.warning is not None) is warned


def test_the_warning_names_losses_and_steps() -> None:
    found = overfitting(result([3, 2, 1, 0.5], [3, 2, None, 3]))
    assert found is not None and found.warning is not None
    assert "rose from 2 (step 20) to 3 (step 40)" in found.warning
    assert "fell from 2 to 0.5" in found.warning and "of step 20" in found.warning
    assert (found.best_step, found.gap) == (20, 2.5)


def test_without_validation_nothing_is_said() -> None:
    assert overfitting(result([3, 2], [None, None])) is None
    assert overfitting(result([], [1.0])) is None
