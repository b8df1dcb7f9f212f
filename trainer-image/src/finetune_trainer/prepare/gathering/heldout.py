"""Compares the training samples with the held-out ones, once all of them are written.

A held-out share and the training records come out of one stream, so nothing can be compared before
its end. The shards are then read back one at a time: memory holds some tokens, and the disk the
n-grams of the held-out samples. Leaving a sample out takes it out of the index; its tokens stay in
the shard.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import groupby, takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from finetune_trainer.failures import DataError
from finetune_trainer.prepare.gathering.indexes import IndexedSamples
from finetune_trainer.prepare.gathering.output import Output
from finetune_trainer.prepare.gathering.report import PLACES, Contamination
from finetune_trainer.prepare.quality.contamination import HeldOut, first_shared
from finetune_trainer.prepare.quality.hashsets import HashSet
from finetune_trainer.prepare.quality.personal import scan
from finetune_trainer.prepared.split import Side

log = logging.getLogger(__name__)

HELD_OUT: tuple[Side, ...] = ("validation", "test")


def compare(output: Output, policy: str, decode: Callable[[Any], str], scratch: Path) -> None:
    """Find the training samples that share an n-gram with a held-out one, and do what the policy
    says.

    Args:
        output: all samples; gets the report, and what is to be left out.
        policy: ``data.quality.contamination``.
        decode: text of token ids.
        scratch: folder for temporary files.

    Raises:
        DataError: 'Contaminated' under policy Fail, or where nothing of a training set is left.
    """
    if policy == "Ignore" or not any(output.samples(side) for side in HELD_OUT):
        return
    with TemporaryDirectory(dir=scratch) as folder:
        held_out = HeldOut(Path(folder))
        taken = takewhile(lambda _: not held_out.full, _held_out(output))
        for _, some_of_set in groupby(taken, key=lambda some: some.set):
            for some in some_of_set:
                held_out.add(some.ids, some.starts)
            held_out.end_set()
        found = output.contamination = Contamination(
            sum(output.samples(side) for side in HELD_OUT), held_out.samples, policy
        )
        _find(output, held_out.known(), found, decode)
    _act(output, found, policy)


def _held_out(output: Output) -> Iterator[IndexedSamples]:
    for side in HELD_OUT:
        yield from output.tokens(side)


def _find(
    output: Output, known: HashSet, found: Contamination, decode: Callable[[Any], str]
) -> None:
    for some in output.tokens("train"):
        shared = first_shared(some.ids, some.starts, known)
        if not shared:
            continue
        before = found.sets.get(some.set, np.empty(0, np.int64))
        positions = np.fromiter(shared, np.int64) + some.first
        found.sets[some.set] = np.append(before, positions)
        for row in list(shared)[: max(0, PLACES - len(before))]:
            found.examples[some.first + row] = scan(decode(shared[row]))[0]
    found.places = output.places(found.examples)


def _act(output: Output, found: Contamination, policy: str) -> None:
    for number, positions in found.sets.items():
        report = output.report_of(number)
        count, samples = len(positions), report.sides["train"].samples
        what = (
            f"{count} of {samples} samples of training set {report.name!r} share text with a"
            f" held-out sample; the first is {found.places[int(positions[0])]}:"
            f" {found.examples[int(positions[0])]!r}"
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
                f"{what}; data.quality.contamination Drop would leave nothing of the set. Correct"
                " the data, or take the set out",
            )
        log.warning("%s (data.quality.contamination: %s)", what, policy)
    if policy == "Drop":
        output.leave_out(found)
