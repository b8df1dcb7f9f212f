"""The stages of a run, in order, and what each leads to.

How a stage looks elsewhere is a row in that room: ``children.jobs`` (its Job and command) and
``status.activity`` (phase, reason and message while the stage works).
"""

from __future__ import annotations

from typing import Final

from finetune_api.names import ROLES, Role
from finetune_api.names import Condition as ConditionType

STAGES: Final[tuple[Role, ...]] = ROLES
GANG: Final[Role] = "train"
"""The stage whose pods form a gang: they need each other, hold the GPUs and wait in the queue."""

CONDITION: Final[dict[Role, ConditionType]] = {
    "prepare": "Prepared",
    "train": "Evaluated",
    "publish": "Published",
}
"""Condition that a stage leads to. Stages may share one: it is True once all of them are done, and
until then its reason and message are those of the present stage."""
