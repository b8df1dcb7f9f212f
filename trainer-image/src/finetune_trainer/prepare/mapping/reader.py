"""Reads the parts of the data as batches of drafts, and tells how far it is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO, Final

from finetune_api.sources import Data, Format
from finetune_api.tasks import TaskName
from finetune_trainer.failures import DataError
from finetune_trainer.prepare.quality.personal import redacted
from finetune_trainer.prepare.reading.faults import Complain, Faults, refuse
from finetune_trainer.prepare.reading.lines import lines_between
from finetune_trainer.prepare.reading.parts import LineCounter, Part, Piece
from finetune_trainer.prepare.reading.records import Record, read_lines, read_records
from finetune_trainer.prepare.reading.sources import Source
from finetune_trainer.prepare.rendering.chat import ChatTemplate
from finetune_trainer.prepare.rendering.drafts import Draft, drafter
from finetune_trainer.prepare.tasks import RENDERINGS, format_of, stated_format
from finetune_trainer.prepare.tokenizing.tokens import Model

BATCH: Final = 512
"""Most records that are held as text at once."""


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
    """Size of all that this worker reads."""


Say = Callable[[Reading], None]


@dataclass(frozen=True)
class Batch:
    """Some records of a part."""

    records: int
    """Records read for it, with those that could not be used."""
    drafts: list[Draft]


@dataclass(frozen=True)
class Opening:
    """What the first records of a source tell."""

    format: Format | None
    """Its format; None where no record tells."""
    untold: int
    """Records before the one that tells."""


class Reader:
    """Reads parts, one after the other.

    Args:
        sources: all sources of the run.
        parts: what this worker reads.
    """

    def __init__(self, sources: Sequence[Source], parts: Sequence[Part], say: Say) -> None:
        self._sources, self._say = sources, say
        self._total = sum(part.bytes for part in parts)
        self._records = 0
        self._done = 0
        self._stream: BinaryIO | None = None
        self._begun = 0
        self._lines = LineCounter()
        self._openings: dict[int, Opening] = {}

    def pass_over(self, part: Part) -> None:
        """The part is done already."""
        self._done += part.bytes

    def read(
        self, part: Part, data: Data, model: Model, faults: Faults
    ) -> tuple[Format | None, Iterator[Batch]]:
        """Format of the part's source, found out from its first record where the spec names none,
        and the part's batches. Batches are those of the part, whoever reads it.

        Raises (the iterator):
            DataError: what ``faults`` does not take.
        """
        source = self._sources[part.source]
        first = part.pieces[0]
        opening = self._opening(part.source, data.quality.faulty_records, model.task)
        begins = first.item is source.objects[0] and first.start == 0
        untold = opening.untold if begins else 0
        form = opening.format
        if form is None:
            nothing: Callable[[Record], list[Draft]] = lambda record: []  # noqa: E731
            return None, self._batches(part, faults, nothing, sys.maxsize, model.task)
        chat = ChatTemplate(model.tokenizer, model.source) if form == "Messages" else None
        redact = redacted if data.quality.personal_data == "Redact" else str
        make = drafter(source, form, data, chat, redact, RENDERINGS[model.task].content)
        return form, self._batches(part, faults, make, untold, model.task)

    def _batches(
        self,
        part: Part,
        faults: Faults,
        make: Callable[[Record], list[Draft]],
        untold: int,
        task: TaskName,
    ) -> Iterator[Batch]:
        """Batches of a part whose first records tell no format."""
        source = self._sources[part.source]
        drafts: list[Draft] = []
        told = self._records
        for count, record in enumerate(self._records_of(part, faults), start=1):
            try:
                if count <= untold:
                    format_of(source.spec, record, task)
                drafts += make(record)
            except DataError as error:
                faults.take(error)
            if count % BATCH == 0:
                yield Batch(self._records - told, drafts)
                self._tell(source)
                drafts, told = [], self._records
        yield Batch(self._records - told, drafts)
        self._tell(source)

    def _opening(self, number: int, policy: str, task: TaskName) -> Opening:
        """What a source's first records tell: every worker reads as far as it needs for this.
        Their faults are for who reads the part that they are of."""
        source = self._sources[number]
        if number not in self._openings:
            form, untold = stated_format(source.spec, task), 0
            with suppress(DataError):
                for record in () if form else _opening_records(source, policy):
                    try:
                        form = format_of(source.spec, record, task)
                        break
                    except DataError:
                        untold += 1
                        if policy == "Fail":
                            break
            self._openings[number] = Opening(form, untold)
        return self._openings[number]

    def _records_of(self, part: Part, faults: Faults) -> Iterator[Record]:
        def malformed(error: DataError) -> None:
            self._records += 1
            faults.take(error)

        for piece in part.pieces:
            with piece.item.open() as self._stream:
                self._begun = piece.start
                for record in self._records_in(piece, self._stream, malformed):
                    self._records += 1
                    yield record
            self._stream = None
            self._done += piece.end - piece.start

    def _records_in(self, piece: Piece, stream: BinaryIO, complain: Complain) -> Iterator[Record]:
        if piece.whole:
            return read_records(piece.item.uri, stream, complain)
        before = self._lines.before(piece, stream)
        lines = self._lines.counted(piece, lines_between(stream, piece.start, piece.end))
        return read_lines(piece.item.uri, lines, complain, before)

    def _tell(self, source: Source) -> None:
        at = max(0, self._stream.tell() - self._begun) if self._stream is not None else 0
        read = min(self._total, self._done + at)
        self._say(Reading(source.name, self._records, read, self._total))


def _opening_records(source: Source, policy: str) -> Iterator[Record]:
    complain = refuse if policy == "Fail" else _ignore
    for item in source.objects:
        with item.open() as stream:
            yield from read_records(item.uri, stream, complain)


def _ignore(error: DataError) -> None:
    """The ``Complain`` of who only looks."""
