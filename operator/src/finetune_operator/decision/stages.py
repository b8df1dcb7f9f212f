"""The stages of a run."""

from __future__ import annotations

from typing import Final

from finetune_api.names import Condition as ConditionType
from finetune_api.names import Role

STAGE_CONDITION: Final[dict[Role, ConditionType]] = {
    "prepare": "Prepared",
    "train": "Evaluated",
    "publish": "Published",
}
