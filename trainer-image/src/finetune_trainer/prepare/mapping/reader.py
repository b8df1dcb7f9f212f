"""Reads input splits as batches of raw records, and tells how far it is: all of map that must be
done in order, and little of its work."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

from finetune_api.sources import Format
from finetune_api.tasks import TaskName
from finetune_trainer.failures import DataError
from finetune_trainer.prepare.reading.inputsplits import ByteRange, InputSplit, LineCounter
from finetune_trainer.prepare.reading.lines import lines_between
from finetune_trainer.prepare.reading.records import RawRecord, parse, raw_lines, raw_records
from finetune_trainer.prepare.reading.sources import Source
from finetune_trainer.prepare.task_formats import format_of, stated_format

BATCH_RECORDS: Final = 512
BATCH_BYTES: Final = 1 << 18
"""Records and bytes at which a batch is full: a tenth of a second of work for a core."""


@dataclass(frozen=True)
class Reading:
    """How far the reading is."""

    set: str
    """Name of the set that is read."""
    records: int
    """Records read, of all sets."""
    bytes: int
    """Bytes read, of all objects, as they are stored."""
    total_bytes: int
    """Size of all that this pod reads."""


Say = Callable[[Reading], None]


@dataclass(frozen=True)
class Batch:
    """Some records of an input split, one after the other."""

    number: int
    """In its split, from 0."""
    format: Format | None
    """Format of its source; None where no record tells."""
    records: list[RawRecord]
    untold: int
    """The first of them, which tell no format."""
    broken: DataError | None
    """Why the object cannot be read behind these records."""
    last: bool
    """Whether the split ends with it."""
    reading: Reading


@dataclass(frozen=True)
class Opening:
    """What the first records of a source tell."""

    format: Format | None
    """Its format; None where no record tells."""
    untold: int
    """Records before the one that tells."""


class Reader:
    """Reads input splits, one after the other.

    Args:
        sources: all sources of the run.
        splits: what this pod reads.
        task: what the samples are for.
        policy: ``data.quality.faultyRecords``.
    """

    def __init__(
        self, sources: Sequence[Source], splits: Sequence[InputSplit], task: TaskName, policy: str
    ) -> None:
        self._sources, self._task, self._policy = sources, task, policy
        self._total = sum(split.bytes for split in splits)
        self._records = 0
        self._done = 0
        self._stream: BinaryIO | None = None
        self._begun = 0
        self._lines = LineCounter()
        self._openings: dict[int, Opening] = {}

    def pass_over(self, split: InputSplit) -> None:
        """The split is done already."""
        self._done += split.bytes

    def read(self, split: InputSplit) -> Iterator[Batch]:
        """The batches of a split, at least one; the same whoever reads it.

        Raises (the iterator):
            DataError: 'ObjectChanged'.
        """
        source, first = self._sources[split.source], split.ranges[0]
        opening = self._opening(split.source)
        begins = first.item is source.objects[0] and first.start == 0
        untold = opening.untold if begins else 0
        if opening.format is None:
            untold = sys.maxsize
        for number, (records, broken, last) in enumerate(self._batches(split)):
            yield Batch(
                number, opening.format, records, min(untold, len(records)), broken, last,
                self._reading(source),
            )  # fmt: skip
            untold -= min(untold, len(records))

    def _batches(
        self, split: InputSplit
    ) -> Iterator[tuple[list[RawRecord], DataError | None, bool]]:
        """Records, what ends the split before its time, and whether these are its last."""
        records: list[RawRecord] = []
        size, broken = 0, None
        try:
            for record in self._records_of(split):
                if len(records) == BATCH_RECORDS or size >= BATCH_BYTES:
                    yield records, None, False
                    records, size = [], 0
                records.append(record)
                size += _size_of(record.content)
        except DataError as error:
            if error.reason == "ObjectChanged":  # not of the data as it was: no order decides
                raise
            broken = error
        yield records, broken, True

    def _opening(self, number: int) -> Opening:
        """What a source's first records tell: each pod reads as far as it needs for this. Their
        faults are for who maps the split that they are of."""
        source = self._sources[number]
        if number not in self._openings:
            form, untold = stated_format(source.spec, self._task), 0
            with suppress(DataError):
                for raw in () if form else _first_records(source):
                    try:
                        form = format_of(source.spec, parse(raw), self._task)
                        break
                    except DataError:
                        untold += 1
                        if self._policy == "Fail":
                            break
            self._openings[number] = Opening(form, untold)
        return self._openings[number]

    def _records_of(self, split: InputSplit) -> Iterator[RawRecord]:
        for piece in split.ranges:
            with piece.item.open() as self._stream:
                self._begun = piece.start
                for record in self._records_in(piece, self._stream):
                    self._records += 1
                    yield record
            self._stream = None
            self._done += piece.end - piece.start

    def _records_in(self, piece: ByteRange, stream: BinaryIO) -> Iterator[RawRecord]:
        if piece.whole:
            return raw_records(piece.item.uri, stream)
        before = self._lines.before(piece, stream)
        lines = self._lines.counted(piece, lines_between(stream, piece.start, piece.end))
        return raw_lines(piece.item.uri, lines, before)

    def _reading(self, source: Source) -> Reading:
        at = max(0, self._stream.tell() - self._begun) if self._stream is not None else 0
        read = min(self._total, self._done + at)
        return Reading(source.name, self._records, read, self._total)


def _first_records(source: Source) -> Iterator[RawRecord]:
    for item in source.objects:
        with item.open() as stream:
            yield from raw_records(item.uri, stream)


def _size_of(content: Any) -> int:
    """About how many bytes a raw record has; the same for the same record."""
    if isinstance(content, dict):
        return sum(map(_size_of, content.values()))
    if isinstance(content, list):
        return sum(map(_size_of, content))
    return len(content) if isinstance(content, bytes | str) else 8
