"""Format detection: the format of a source, from the spec or the source's first records."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

from finetune_api.sources import Format
from finetune_api.tasks import TaskName
from finetune_trainer.failures import DataError
from finetune_trainer.prepare.reading.inputsplits import InputSplit
from finetune_trainer.prepare.reading.records import RawRecord, parse, raw_records
from finetune_trainer.prepare.reading.sources import Source
from finetune_trainer.prepare.task_formats import format_of, stated_format


@dataclass(frozen=True)
class DetectedFormat:
    """The format of a source, or of an input split of it."""

    format: Format | None
    """None where no format is detected."""
    records_without_format: int
    """Number of leading records in which no format is detected; where ``format`` is None, more than
    any source has."""


NOT_DETECTED: Final = DetectedFormat(None, sys.maxsize)


class FormatDetector:
    """Detects the format of each source once.

    The format is that of the spec, else that of the first record that has one. Each pod reads the
    first records of its sources for this, also where another pod maps them. Their errors are
    ignored here: mapping the input split of the record raises them.

    Args:
        sources: all sources of the run.
        task: task that the samples are prepared for.
        policy: ``data.quality.faultyRecords``. Under Fail, the first record without a format ends
            the detection: it fails the job.
    """

    def __init__(self, sources: Sequence[Source], task: TaskName, policy: str) -> None:
        self._sources, self._task, self._policy = sources, task, policy
        self._detected: dict[int, DetectedFormat] = {}

    def detect(self, split: InputSplit) -> DetectedFormat:
        """Return the format of an input split: that of its source. Only the first split of a source
        has leading records without a format, unless the source has no format.

        Raises:
            UserError: 'FormatNotForTask'.
        """
        source = self._sources[split.source]
        if split.source not in self._detected:
            self._detected[split.source] = self._detect(source)
        detected, first = self._detected[split.source], split.ranges[0]
        begins_source = first.item is source.objects[0] and first.start == 0
        if begins_source or detected.format is None:
            return detected
        return replace(detected, records_without_format=0)

    def _detect(self, source: Source) -> DetectedFormat:
        stated = stated_format(source.spec, self._task)
        if stated is not None:
            return DetectedFormat(stated, 0)
        without_format = 0
        with suppress(DataError):  # an object cannot be read
            for raw in _records_of(source):
                try:
                    found = format_of(source.spec, parse(raw), self._task)
                    return DetectedFormat(found, without_format)
                except DataError:
                    without_format += 1
                    if self._policy == "Fail":
                        break
        return NOT_DETECTED


def _records_of(source: Source) -> Iterator[RawRecord]:
    for item in source.objects:
        with item.open() as stream:
            yield from raw_records(item.uri, stream)
