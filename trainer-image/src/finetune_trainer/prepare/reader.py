"""Reads data sources as batches of drafts, and tells how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import BinaryIO, Final

from finetune_api.sources import Data, Format
from finetune_trainer.failures import DataError
from finetune_trainer.prepare.chat import ChatTemplate
from finetune_trainer.prepare.digest import Source
from finetune_trainer.prepare.drafts import Draft, drafter, format_of
from finetune_trainer.prepare.faults import Faults
from finetune_trainer.prepare.personal import redacted
from finetune_trainer.prepare.records import Record, read_records
from finetune_trainer.prepare.tokens import Model

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
    """Size of all objects."""


Say = Callable[[Reading], None]


@dataclass(frozen=True)
class Batch:
    """Some records of a source."""

    records: int
    """Records read for it, with those that could not be used."""
    drafts: list[Draft]


class Reader:
    """Reads the sources of a run, one after the other."""

    def __init__(self, sources: Sequence[Source], say: Say) -> None:
        self._say = say
        self._total = sum(o.size for source in sources for o in source.objects)
        self._records = 0
        self._done = 0
        self._stream: BinaryIO | None = None

    def open(
        self, source: Source, data: Data, model: Model, faults: Faults
    ) -> tuple[Format, Iterator[Batch]]:
        """Format of a source, found out from its first record where the spec names none, and its
        batches.

        Raises:
            DataError: 'EmptyDataSet' where it has no record; 'MostRecordsFaulty'; what ``faults``
                does not take, also from the iterator.
        """
        before = self._records
        records = self._read(source, faults)
        first, form = self._first(source, records, faults)
        if first is None or form is None:
            faults.check(source.name, self._records - before)
            raise DataError(
                "EmptyDataSet",
                f"data set {source.name!r} is empty: {source.spec.source} matches"
                f" {len(source.objects)} objects, but they hold no record; correct the data source",
            )
        chat = ChatTemplate(model.tokenizer, model.source) if form == "Messages" else None
        redact = redacted if data.quality.personal_data == "Redact" else str
        make = drafter(source, form, data, chat, redact)

        def batches() -> Iterator[Batch]:
            drafts: list[Draft] = []
            told = before
            for count, record in enumerate(chain([first], records), start=1):
                try:
                    drafts += make(record)
                except DataError as error:
                    faults.take(error)
                if count % BATCH == 0:
                    yield Batch(self._records - told, drafts)
                    self._tell(source)
                    drafts, told = [], self._records
            yield Batch(self._records - told, drafts)
            self._tell(source)
            faults.check(source.name, self._records - before)

        return form, batches()

    def _first(
        self, source: Source, records: Iterator[Record], faults: Faults
    ) -> tuple[Record | None, Format | None]:
        """The first record, and the format that it, or the spec, says."""
        for record in records:
            try:
                return record, format_of(source.spec, record)
            except DataError as error:
                faults.take(error)
        return None, None

    def _read(self, source: Source, faults: Faults) -> Iterator[Record]:
        def malformed(error: DataError) -> None:
            self._records += 1
            faults.take(error)

        for item in source.objects:
            with item.open() as self._stream:
                for record in read_records(item.uri, self._stream, malformed):
                    self._records += 1
                    yield record
            self._stream = None
            self._done += item.size

    def _tell(self, source: Source) -> None:
        at = self._stream.tell() if self._stream is not None else 0
        self._say(Reading(source.name, self._records, self._done + at, self._total))
