"""The stages of a run, in order, and the condition that each leads to.

The other tables with an entry per stage are ``children.jobs`` (Job and command) and
``status.activity`` (phase, reason and message while the stage works).

Map is a stage if ``prepare.workers`` is above 1: an Indexed Job with that many pods, each of which
maps its share of the data. The Job's completion is the barrier before the single pod of prepare
reduces.
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
"""Condition that a stage leads to. Stages may share a condition: it is True once all of them are
done; until then its reason and message are those of the current stage."""


TESTED: Final = ("GatesPending", "GatesMissed")
"""Reasons of the condition Evaluated that also say that the gang is done."""


def stages_of(spec: FineTuneJobSpec) -> tuple[Role, ...]:
    """The stages that a run of a spec has."""
    return STAGES if spec.prepare.workers > 1 else tuple(r for r in STAGES if r != "map")


def akin(stage: Role | None) -> tuple[Role, ...]:
    """The stages that lead to the same condition as ``stage``: they write the same output."""
    return tuple(r for r in STAGES if stage is not None and CONDITION[r] == CONDITION[stage])
