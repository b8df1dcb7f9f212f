"""Map: turns input splits into shards and sample statistics.

    input split ─(read)→ batches ─(a pool of processes, in order)→ shards, statistics ─→ storage

Pods map independently. Each pod first maps all held-out sources that are objects of their own, so
that it knows every n-gram that training samples are compared with. Pods that map the same split
write the same bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune_api.sources import Data
from finetune_trainer.failures import DataError
from finetune_trainer.prepare.mapping.batch import Task, map_batch
from finetune_trainer.prepare.mapping.pool import Pool
from finetune_trainer.prepare.mapping.progress import ProgressCallback
from finetune_trainer.prepare.mapping.reader import Batch, Reader
from finetune_trainer.prepare.mapping.results import SplitResults
from finetune_trainer.prepare.mapping.writer import OFFERED, SplitWriter
from finetune_trainer.prepare.quality.contamination import HeldOut
from finetune_trainer.prepare.reading.inputsplits import InputSplit
from finetune_trainer.prepare.reading.sources import Source
from finetune_trainer.prepared.dataset import pieces_of, shard_ids
from finetune_trainer.prepared.split import HELD_OUT, SIDES, shares_of
from finetune_trainer.storage.objects import ObjectStore

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunPaths:
    """Where prepared data and intermediate results are written."""

    store: ObjectStore
    uri: str
    """Prefix of the prepared data."""
    digest: str
    """Content digest of the prepared data."""
    splits: str
    """Folder of the run for the results of its input splits, in storage."""
    scratch: Path
    """Local folder for temporary files."""

    @property
    def results(self) -> SplitResults:
        return SplitResults(self.store, self.splits, self.uri)


@dataclass(frozen=True)
class Known:
    """N-grams of the held-out samples, collected before training records are mapped."""

    path: Path
    """File for ``HashSet``."""
    samples: int
    """Number of held-out samples."""


def map_splits(
    data: Data,
    sources: Sequence[Source],
    splits: Sequence[InputSplit],
    reader: Reader,
    pool: Pool,
    paths: RunPaths,
    say: ProgressCallback,
) -> None:
    """Map the input splits that are not done, up to the first that fails. The failure is saved for
    the reduce, which raises the first one in the order of the data.

    Args:
        splits: in the order of the data, with all splits of the held-out sources.
        reader: of these splits.

    Raises:
        DataError: 'ObjectChanged'.
        UserError: the tokenizer does not fit the model or the data.
    """
    results = paths.results
    done = results.done(splits)
    for split in splits:
        if split.number in done:
            reader.skip(split)
    todo = [split for split in splits if split.number not in done]
    held_out = [split for split in todo if sources[split.source].side != "train"]
    training = [split for split in todo if sources[split.source].side == "train"]
    if not _map(held_out, sources, reader, pool, paths, say, None) or not training:
        return
    known = None
    if compared_in_map(data):
        of_held_out = [split for split in splits if sources[split.source].side in HELD_OUT]
        known = _held_out_ngrams(of_held_out, sources, paths)
    _map(training, sources, reader, pool, paths, say, known)


def compared_in_map(data: Data) -> bool:
    """Whether map compares training samples with held-out samples. This requires that all held-out
    data are objects of their own: a share of the training sources is known only after the map."""
    shares = shares_of(data, "train")
    assert shares is not None, "training sources have shares"
    own = bool(data.validation or data.test)
    return own and data.quality.contamination != "Ignore" and not (shares.validation or shares.test)


def _map(
    splits: Sequence[InputSplit],
    sources: Sequence[Source],
    reader: Reader,
    pool: Pool,
    paths: RunPaths,
    say: ProgressCallback,
    known: Known | None,
) -> bool:
    """Map splits; return False after a failure."""
    results = paths.results
    writing: dict[int, SplitWriter] = {}

    def behind_failure(split: InputSplit) -> bool:
        """Whether an earlier split has failed, in any pod: the run fails, so mapping is useless."""
        failed = results.first_failed()
        return failed is not None and failed < split.number

    def tasks() -> Iterator[tuple[tuple[InputSplit, Batch], Task]]:
        for split in splits:
            if behind_failure(split):
                return
            for batch in reader.read(split):
                writer = writing.get(split.number)
                wanted = writer.wanted() if writer else dict.fromkeys(SIDES, OFFERED)
                task = Task(split.source, batch, known.path if known else None, wanted)
                yield (split, replace(batch, records=[])), task

    for (split, batch), result in pool.in_order(map_batch, tasks()):
        name = sources[split.source].name
        if batch.number == 0:
            writing[split.number] = SplitWriter(
                paths.store, paths.uri, paths.scratch, name, split.number
            )
        try:
            writing[split.number].add(result())
        except DataError as error:
            log.warning("input split %d: %s", split.number, error.message)
            results.save_failure(split, error)
            return False
        say(batch.progress)
        if batch.last:
            compared = known.samples if known else None
            results.save(split, *writing.pop(split.number).finish(batch.format, compared))
    return True


def _held_out_ngrams(
    splits: Sequence[InputSplit], sources: Sequence[Source], paths: RunPaths
) -> Known:
    """Collect the n-grams of the held-out sources from their shards in storage."""
    folder = paths.scratch / "held-out"
    folder.mkdir(exist_ok=True)
    held_out, results = HeldOut(folder), paths.results
    path = paths.scratch / "held-out.arrow"
    for number in dict.fromkeys(split.source for split in splits):
        for split in splits:
            if split.source != number:
                continue
            for file in results.summary(split).shards[sources[number].side]:
                paths.store.download(f"{paths.uri}/{file.name}", path)
                for _, ids, starts in pieces_of(*shard_ids(path)):
                    if not held_out.full:
                        held_out.add(ids, starts)
                path.unlink()
        held_out.end_set()
    return Known(held_out.write(), held_out.samples)
