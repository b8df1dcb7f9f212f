"""Which samples of the prepared data some positions in an index are: for messages and metrics.json.

The index knows a sample's set, shard and row. Objects and lines of the source are not kept, so a
sample is named by its number among the prepared ones of its set.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

from finetune_trainer.prepared.dataset import PreparedData
from finetune_trainer.prepared.split import Side
from finetune_trainer.storage.runfiles import SampleOrigin

MOST: Final = 100
"""Samples that are named; more would not be looked at one by one."""
_NUMBERS: Final = 5
_SETS: Final = 3


def origins_of(data: PreparedData, side: Side, positions: Sequence[int]) -> list[SampleOrigin]:
    """Places of the samples at some positions of a side's index, of the first ``MOST``."""
    index, shards = data.index(side), data.manifest.shards[side]

    def place(position: int) -> SampleOrigin:
        number = index.set[position]
        first = int(np.searchsorted(index.set, number))  # samples stand set by set
        return SampleOrigin(
            data_set=data.manifest.sets[number].name, number=position - first + 1,
            shard=shards[index.shard[position]], row=int(index.row[position]),
        )  # fmt: skip

    return [place(int(position)) for position in positions[:MOST]]


def in_words(places: Iterable[SampleOrigin]) -> str:
    """The first of them, for people: ``samples 3, 17 of 'support'; sample 1 of 'notes'``."""
    sets: dict[str, list[int]] = {}
    for place in places:
        sets.setdefault(place.data_set, []).append(place.number)
    told = []
    for name, numbers in list(sets.items())[:_SETS]:
        shown = ", ".join(map(str, numbers[:_NUMBERS])) + ", …" * (len(numbers) > _NUMBERS)
        told.append(f"sample{'s' * (len(numbers) > 1)} {shown} of {name!r}")
    return "; ".join(told) + "; …" * (len(sets) > _SETS)
