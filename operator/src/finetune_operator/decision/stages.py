"""The stages of a run, in order, and what each leads to.

How a stage looks elsewhere is a row in that room: ``children.jobs`` (its Job and command) and
``status.activity`` (phase, reason and message while the stage works).

Map is a stage where ``prepare.workers`` is above 1: an Indexed Job of as many pods, each of which
maps its share of the data. Its end is the barrier behind which the one pod of prepare reduces.
"""

from __future__ import annotations

from typing import Final

from finetune_api.names import ROLES, Role
from finetune_api.names import Condition as ConditionType
from finetune_api.spec import FineTuneJobSpec

STAGES: Final[tuple[Role, ...]] = ROLES
GANG: Final[Role] = "train"
"""The stage whose pods form a gang: they need each other, hold the GPUs and wait in the queue."""

CONDITION: Final[dict[Role, ConditionType]] = {
    "map": "Prepared",
    "prepare": "Prepared",
    "train": "Evaluated",
    "publish": "Published",
}
"""Condition that a stage leads to. Stages may share one: it is True once all of them are done, and
until then its reason and message are those of the present stage."""


def stages_of(spec: FineTuneJobSpec) -> tuple[Role, ...]:
    """The stages that a run of a spec has."""
    return STAGES if spec.prepare.workers > 1 else tuple(r for r in STAGES if r != "map")


def akin(stage: Role | None) -> tuple[Role, ...]:
    """The stages that lead to the same condition as one: they write the same."""
    return tuple(r for r in STAGES if stage is not None and CONDITION[r] == CONDITION[stage])
