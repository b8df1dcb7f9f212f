"""What is done about records that cannot be used: the first one ends the job, or all are left out.

A fault is of one record (a malformed line, a missing field, nothing to learn). What is wrong with
a whole object, the model or the manifest always ends the job.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any, Final

from finetune_trainer.failures import DataError

Complain = Callable[[DataError], None]
"""Is told of a record that cannot be used: it raises the error, or the record is left out."""

MOST: Final = 0.5
"""Share of a source's records above which dropping is no answer: the source is misunderstood."""

SHOWN: Final = 5
"""Faults that the report shows."""


def refuse(error: DataError) -> None:
    """The ``Complain`` that takes no fault."""
    raise error


class Faults:
    """The faulty records of one source.

    Args:
        policy: ``data.quality.faultyRecords``.
    """

    def __init__(self, policy: str) -> None:
        self._policy = policy
        self.reasons: Counter[str] = Counter()
        """Records left out, by reason."""
        self.first: list[DataError] = []

    def take(self, error: DataError) -> None:
        """Count a fault, or end the job by it.

        Raises:
            DataError: the fault, under policy Fail.
        """
        if self._policy == "Fail":
            raise DataError(
                error.reason,
                f"{error.message}; or set data.quality.faultyRecords to Drop, which leaves such"
                " records out",
            )
        self.reasons[error.reason] += 1
        if len(self.first) < SHOWN:
            self.first.append(error)

    def check(self, name: str, records: int) -> None:
        """Whether enough is left of a source.

        Args:
            name: of the data set, for the message.
            records: all that were read of it, with the faulty ones.

        Raises:
            DataError: 'MostRecordsFaulty' where more than half cannot be used.
        """
        faulty = self.reasons.total()
        if faulty > MOST * records:
            raise DataError(
                "MostRecordsFaulty",
                f"data set {name!r}: {faulty} of {records} records ({faulty / records:.0%}) cannot"
                " be used, and data.quality.faultyRecords Drop leaves out at most half of a set."
                f" The first: {self.first[0].message}",
            )

    def merge(self, reasons: Mapping[str, int], first: Iterable[DataError]) -> None:
        """Count the faults of a part."""
        self.reasons.update(reasons)
        self.first += islice(first, SHOWN - len(self.first))

    def to_json(self) -> list[dict[str, Any]]:
        return [{"reason": error.reason, "message": error.message} for error in self.first]
