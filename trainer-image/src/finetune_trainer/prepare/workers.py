"""What each worker of a run does: map its parts, and, where it is the first, gather them all.

    parts ─(dealt)→ map: shards, facts ─(meeting)→ gather: index → report → manifest

One worker is the same with all parts of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_api.sources import Data
from finetune_trainer.failures import DataError
from finetune_trainer.prepare.gathering.gather import gather
from finetune_trainer.prepare.gathering.output import Output
from finetune_trainer.prepare.mapping.mapper import Mapper
from finetune_trainer.prepare.mapping.reader import Reader, Say
from finetune_trainer.prepare.meeting import Meeting
from finetune_trainer.prepare.reading.parts import Part, deal, divide
from finetune_trainer.prepare.reading.sources import Source
from finetune_trainer.prepare.tasks import RENDERINGS
from finetune_trainer.prepare.tokenizing.tokens import Model
from finetune_trainer.prepared.manifest import DataManifest
from finetune_trainer.storage.objects import ObjectStore

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where prepared data is written."""

    store: ObjectStore
    uri: str
    """Its prefix."""
    digest: str
    """Its content digest."""
    meeting: str
    """Folder in which the workers of the run meet."""
    scratch: Path
    """Folder for files on their way."""


def write_data(
    data: Data,
    sources: Sequence[Source],
    model: Model,
    place: Place,
    worker: int,
    workers: int,
    *,
    check: Callable[[], None],
    say: Say,
) -> DataManifest | None:
    """Do the work of one of the workers.

    Args:
        check: raises where the sources are not what they were; asked last of all, by every worker.

    Returns:
        The manifest, written last, where the worker is the first; else None.

    Raises:
        DataError: naming the record that cannot be used; 'EmptyDataSet', 'TooManyDuplicates',
            'Contaminated', 'UnknownLabel', 'TooFewClasses'. A later worker leaves what is wrong
            with a record to the first.
        UserError: where the model's tokenizer fits neither the model nor the data.
    """
    place.scratch.mkdir(parents=True, exist_ok=True)
    parts = divide(sources)
    mine = deal(parts, workers)[worker]
    log.info("worker %d of %d: %d of %d parts", worker, workers, len(mine), len(parts))
    meeting = Meeting(place.store, place.meeting, place.uri)
    reader = Reader(sources, mine, say)
    mapper = Mapper(data, model, reader, place.store, place.uri, place.scratch)
    _map(mine, sources, reader, mapper, meeting)
    if worker:
        check()
        return None
    output = Output(place.store, place.uri, place.digest, place.scratch)
    decode = model.tokenizer.decode
    try:
        gather(data, sources, parts, meeting, output, place.scratch, meanwhile=check, decode=decode)
        check()
        classes_of = RENDERINGS[model.task].classes
        manifest = output.finish(model.max_length, data.quality, classes_of)
    except DataError:
        meeting.end()
        raise
    meeting.end()
    return manifest


def _map(
    mine: Sequence[Part],
    sources: Sequence[Source],
    reader: Reader,
    mapper: Mapper,
    meeting: Meeting,
) -> None:
    """Map parts until one has a fault, or one before it has."""
    done = meeting.done(mine)
    for part in mine:
        if part.number in done:
            reader.pass_over(part)
            continue
        failed = meeting.first_failed()
        if failed is not None and failed < part.number:
            return
        try:
            said, facts = mapper.map(part, sources[part.source])
        except DataError as error:
            if error.reason == "ObjectChanged":  # not of the data as it was: no order decides
                raise
            log.warning("part %d: %s", part.number, error.message)
            meeting.leave_failure(part, error)
            return
        meeting.leave(part, said, facts)
