"""Reads input splits as batches of raw records. Reading is sequential in each pod, unlike the rest
of map, and takes a small part of its time.

    byte ranges of an input split ─(open)→ raw records ─(cut)→ batches
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

from finetune_api.sources import Format
from finetune_api.tasks import TaskName
from finetune_trainer.failures import DataError
from finetune_trainer.prepare.mapping.format_detection import FormatDetector
from finetune_trainer.prepare.mapping.progress import ProgressTracker, ReadProgress
from finetune_trainer.prepare.reading.inputsplits import ByteRange, InputSplit, LineCounter
from finetune_trainer.prepare.reading.lines import lines_between
from finetune_trainer.prepare.reading.records import RawRecord, raw_lines, raw_records
from finetune_trainer.prepare.reading.sources import Source

BATCH_RECORDS: Final = 512
BATCH_BYTES: Final = 1 << 18
"""Records and bytes that fill a batch: about 0.1 s of work for a core."""


@dataclass(frozen=True)
class Batch:
    """Consecutive records of an input split."""

    number: int
    """Index in the split."""
    format: Format | None
    """Format of the source; None where no format is detected."""
    records: list[RawRecord]
    records_without_format: int
    """Number of leading records in which no format is detected: each is a fault."""
    read_error: DataError | None
    """Error of the object after these records."""
    last: bool
    """Whether this is the last batch of the split."""
    progress: ReadProgress


class Reader:
    """Reads the input splits of a pod, one after the other.

    Args:
        sources: all sources of the run.
        splits: input splits of the pod.
        task: task that the samples are prepared for.
        policy: ``data.quality.faultyRecords``.
    """

    def __init__(
        self, sources: Sequence[Source], splits: Sequence[InputSplit], task: TaskName, policy: str
    ) -> None:
        self._sources = sources
        self._formats = FormatDetector(sources, task, policy)
        self._lines = LineCounter()
        self._progress = ProgressTracker(sum(split.bytes for split in splits))

    def skip(self, split: InputSplit) -> None:
        """Count a split that is done as read."""
        self._progress.skip(split.bytes)

    def read(self, split: InputSplit) -> Iterator[Batch]:
        """Yield the batches of a split, at least one. They are the same in any pod.

        Raises:
            DataError: 'ObjectChanged'. Other errors of an object are in ``Batch.read_error``.
            UserError: 'FormatNotForTask'.
        """
        name = self._sources[split.source].name
        detected = self._formats.detect(split)
        without_format = detected.records_without_format
        for number, (records, error, last) in enumerate(_batches(self._records_of(split))):
            count = min(without_format, len(records))
            without_format -= count
            progress = self._progress.current(name)
            yield Batch(number, detected.format, records, count, error, last, progress)

    def _records_of(self, split: InputSplit) -> Iterator[RawRecord]:
        for piece in split.ranges:
            with piece.item.open() as stream:
                self._progress.begin(stream, piece.start)
                for record in self._records_in(piece, stream):
                    self._progress.count_record()
                    yield record
            self._progress.end(piece.end - piece.start)

    def _records_in(self, piece: ByteRange, stream: BinaryIO) -> Iterator[RawRecord]:
        if piece.whole:
            return raw_records(piece.item.uri, stream)
        before = self._lines.before(piece, stream)
        lines = self._lines.counted(piece, lines_between(stream, piece.start, piece.end))
        return raw_lines(piece.item.uri, lines, before)


def _batches(
    records: Iterable[RawRecord],
) -> Iterator[tuple[list[RawRecord], DataError | None, bool]]:
    """Cut the records of a split into batches. Yield the records of each batch, the error that
    ended the reading after them, and whether the batch is the last."""
    batch: list[RawRecord] = []
    size, error = 0, None
    try:
        for record in records:
            if len(batch) == BATCH_RECORDS or size >= BATCH_BYTES:
                yield batch, None, False
                batch, size = [], 0
            batch.append(record)
            size += _size_of(record.content)
    except DataError as raised:
        if raised.reason == "ObjectChanged":  # a change has no place in the order of the data
            raise
        error = raised
    yield batch, error, True


def _size_of(content: Any) -> int:
    """Approximate bytes of a raw record: a function of the record alone, so that the batches are
    the same in any pod."""
    if isinstance(content, dict):
        return sum(map(_size_of, content.values()))
    if isinstance(content, list):
        return sum(map(_size_of, content))
    return len(content) if isinstance(content, bytes | str) else 8
