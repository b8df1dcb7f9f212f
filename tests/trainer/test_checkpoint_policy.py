"""Decisions about checkpoints, as a table."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_trainer.train.checkpoint_policy import (
    CheckpointAction,
    StepStatus,
    decide_checkpoint,
)

QUIET = StepStatus(
    step=5, total=10, evaluation_due=False, due_by_step=False, due_by_time=False, stop=False,
    upload_failed=False, since_save=4,
)  # fmt: skip
NOTHING = CheckpointAction(
    abandon_upload=False, evaluate=False, save=False, force=False, stop=False
)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, {}),
        ({"due_by_step": True}, {"save": True}),
        ({"due_by_step": True, "since_save": 1}, {"save": True}),
        ({"due_by_time": True}, {"save": True}),
        ({"due_by_time": True, "since_save": 1}, {}),
        ({"evaluation_due": True}, {"evaluate": True}),
        ({"evaluation_due": True, "due_by_step": True}, {"evaluate": True}),
        ({"step": 10}, {"evaluate": True, "force": True}),
        ({"stop": True}, {"save": True, "force": True, "stop": True}),
        ({"stop": True, "since_save": 1}, {"save": True, "force": True, "stop": True}),
        (
            {"stop": True, "evaluation_due": True},
            {"evaluate": True, "force": True, "stop": True},
        ),
        ({"stop": True, "step": 10}, {"evaluate": True, "force": True}),
        ({"upload_failed": True}, {"abandon_upload": True}),
        ({"upload_failed": True, "since_save": 1}, {}),
        ({"upload_failed": True, "due_by_step": True}, {"abandon_upload": True, "save": True}),
        ({"upload_failed": True, "stop": True}, {"save": True, "force": True, "stop": True}),
        ({"upload_failed": True, "step": 10}, {"evaluate": True, "force": True}),
    ],
    ids=str,
)
def test_the_action_after_a_step(facts: dict[str, Any], expected: dict[str, bool]) -> None:
    assert decide_checkpoint(QUIET._replace(**facts)) == NOTHING._replace(**expected)
