"""The conditions of a status under construction. A condition keeps its transition time while its
status is unchanged."""

from __future__ import annotations

from datetime import datetime
from typing import Final, Literal

from finetune_api.names import Condition as ConditionType
from finetune_api.status import Condition
from finetune_operator.decision.stages import TESTED
from finetune_operator.status.models import make
from finetune_operator.world.objects import format_time

MESSAGE_MAX: Final = 4096


class Conditions:
    """The conditions of a status under construction."""

    def __init__(
        self, before: list[Condition], generation: int | None, now: datetime, keep: bool
    ) -> None:
        """``keep`` carries the previous conditions over. It is False when a new run begins: then
        only their transition times are kept."""
        self._before = {c.type: c for c in before}
        self._now = {c.type: c for c in before} if keep else {}
        self._generation = generation
        self._time = format_time(now)

    def set(
        self,
        type_: ConditionType,
        status: Literal["True", "False", "Unknown"],
        reason: str,
        message: str = "",
    ) -> None:
        """Set a condition; its transition time changes only with its status."""
        old = self._before.get(type_)
        same = old is not None and old.status == status
        self._now[type_] = make(
            Condition,
            type=type_,
            status=status,
            observed_generation=self._generation,
            last_transition_time=old.last_transition_time if old and same else self._time,
            reason=reason,
            message=message[:MESSAGE_MAX],
        )

    def is_true(self, type_: ConditionType) -> bool:
        """Whether a condition is True so far."""
        found = self._now.get(type_)
        return found is not None and found.status == "True"

    def settled(self, type_: ConditionType) -> bool:
        """Whether a condition is True so far, or its reason says that its stage is done."""
        found = self._now.get(type_)
        return found is not None and (found.status == "True" or found.reason in TESTED)

    def has(self, type_: ConditionType) -> bool:
        """Whether a condition exists, with any status."""
        return type_ in self._now

    def to_list(self) -> list[Condition]:
        """The conditions sorted by type, so that equal statuses compare equal."""
        return [self._now[t] for t in sorted(self._now)]
