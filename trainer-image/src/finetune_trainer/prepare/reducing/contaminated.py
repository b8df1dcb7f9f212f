"""Counts training samples that share text with held-out samples, and drops or rejects them.

Where all held-out sets are objects of their own, map has compared already, and the sample
statistics hold the result. A share held out of the training sources is known only after the map:
then the shards are read back and compared by the pool. A dropped sample is removed from the index;
its tokens stay in the shard.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune_trainer.failures import DataError
from finetune_trainer.personal import redacted
from finetune_trainer.prepare.mapping.pool import Pool
from finetune_trainer.prepare.quality.contamination import HeldOut, first_shared
from finetune_trainer.prepare.quality.hashsets import HashSet
from finetune_trainer.prepare.reducing.indexes import IndexedShard
from finetune_trainer.prepare.reducing.output import Output
from finetune_trainer.prepare.reducing.report import Contamination
from finetune_trainer.prepared.dataset import pieces_of
from finetune_trainer.prepared.split import HELD_OUT

log = logging.getLogger(__name__)

Shared = list[tuple[int, npt.NDArray[np.int32]]]
"""Positions in the training index, with the tokens that the sample shares."""


def compare(
    output: Output, policy: str, pool: Pool, decode: Callable[[Any], str], scratch: Path
) -> None:
    """Find training samples that share an n-gram with a held-out sample, in parallel.

    Args:
        output: all samples; its ``contamination`` is set.
        policy: ``data.quality.contamination``.
        decode: converts token ids to text.
        scratch: folder for temporary files.
    """
    if not any(output.samples(side) for side in HELD_OUT):
        return
    with TemporaryDirectory(dir=scratch) as folder:
        held_out = _held_out_ngrams(output, Path(folder))
        found = output.contamination = Contamination(policy, held_out.samples)
        known = held_out.write()
        tasks = ((shard, (shard, known)) for shard in output.indexed_shards("train"))
        for shard, result in pool.in_order(find_shared, tasks):
            for position, tokens in result():
                shown = "" if found.enough(shard.set) else redacted(decode(tokens))
                found.add(shard.set, position, shown)


def _held_out_ngrams(output: Output, folder: Path) -> HeldOut:
    held_out, before = HeldOut(folder), -1
    for shard in (shard for side in HELD_OUT for shard in output.indexed_shards(side)):
        if shard.set != before:
            held_out.end_set()
        before = shard.set
        for _, ids, starts in pieces_of(*shard.tokens()):
            if not held_out.full:
                held_out.add(ids, starts)
        shard.path.unlink()
    return held_out


def find_shared(task: tuple[IndexedShard, Path]) -> Shared:
    """Find the samples of a shard that share an n-gram with a held-out sample.

    Args:
        task: the shard, whose file is deleted, and the file of the held-out n-grams.
    """
    shard, path = task
    known = HashSet(path)
    found: Shared = []
    for first, ids, starts in pieces_of(*shard.tokens()):
        shared = first_shared(ids, starts, known)
        found += ((shard.first + first + row, tokens.copy()) for row, tokens in shared.items())
    shard.path.unlink()
    return found


def act(output: Output) -> None:
    """Apply the policy to the contaminated samples.

    Raises:
        DataError: 'Contaminated' under policy Fail, or where no sample of a training set is left.
    """
    found = output.contamination
    if found is None:
        return
    found.places = output.places(found.examples)
    policy = found.policy
    for number, positions in found.sets.items():
        report = output.report_of(number)
        count, samples = len(positions), report.sides["train"].samples
        what = (
            f"{count} of {samples} samples of training set {report.name!r} share text with a"
            f" held-out sample; the first is {found.places[positions[0]]}:"
            f" {found.examples[positions[0]]!r}"
        )
        if policy == "Fail":
            raise DataError(
                "Contaminated",
                f"{what}. Take such records out, hold others out, or set"
                " data.quality.contamination to Drop, Warn or Ignore",
            )
        if policy == "Drop" and count == samples:
            raise DataError(
                "Contaminated",
                f"{what}; data.quality.contamination Drop would leave no sample of the set. Correct"
                " the data, or take the set out",
            )
        log.warning("%s (data.quality.contamination: %s)", what, policy)
    if policy == "Drop":
        output.leave_out(found)
