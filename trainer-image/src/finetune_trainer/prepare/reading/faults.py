"""Handling of unusable records: the first one fails the job, or all are dropped.

A fault concerns one record (a malformed line, a missing field, no supervised tokens). An error of a
whole object, the model or the manifest always fails the job.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any, Final

from finetune_trainer.failures import DataError

Complain = Callable[[DataError], None]
"""Callback for the fault of a record: raises the error, or returns to drop the record."""

MOST: Final = 0.5
"""Maximum share of dropped records of a source. Above it, format or template are likely wrong."""

SHOWN: Final = 5
"""Faults shown in the report."""


def refuse(error: DataError) -> None:
    """The ``Complain`` callback that raises every fault."""
    raise error


class Faults:
    """The faulty records of one source.

    Args:
        policy: ``data.quality.faultyRecords``.
    """

    def __init__(self, policy: str) -> None:
        self._policy = policy
        self.reasons: Counter[str] = Counter()
        """Number of dropped records, by reason."""
        self.first: list[DataError] = []

    def take(self, error: DataError) -> None:
        """Count a fault, or fail the job.

        Raises:
            DataError: the fault, under policy Fail.
        """
        if self._policy == "Fail":
            raise DataError(
                error.reason,
                f"{error.message}; or set data.quality.faultyRecords to Drop, which leaves out such"
                " records",
            )
        self.reasons[error.reason] += 1
        if len(self.first) < SHOWN:
            self.first.append(error)

    def check(self, name: str, records: int) -> None:
        """Check that enough records of a source are left.

        Args:
            name: of the data set, for the message.
            records: number of records read, with the faulty ones.

        Raises:
            DataError: 'MostRecordsFaulty', more than half of the records are faulty.
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
        """Add the faults of a part of the source."""
        self.reasons.update(reasons)
        self.first += islice(first, SHOWN - len(self.first))

    def to_json(self) -> list[dict[str, Any]]:
        return [{"reason": error.reason, "message": error.message} for error in self.first]
