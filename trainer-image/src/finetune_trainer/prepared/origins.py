"""Origins of samples by position in an index, for messages and metrics.json.

The index has the set, shard and row of a sample, but not its source object and line, which are in
the shard. Messages therefore name a sample by its number among the prepared samples of its set.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

from finetune_trainer.prepared.dataset import PreparedData
from finetune_trainer.prepared.split import Side
from finetune_trainer.storage.runfiles import SampleOrigin

MOST: Final = 100
"""Maximum samples named; nobody inspects more one by one."""
_NUMBERS: Final = 5
_SETS: Final = 3


def origins_of(data: PreparedData, side: Side, positions: Sequence[int]) -> list[SampleOrigin]:
    """Return the origins of the samples at positions of a side's index, of the first ``MOST``;
    without object and line, for which shards must be read."""
    index, shards = data.index(side), data.manifest.shards[side]

    def place(position: int) -> SampleOrigin:
        number = index.set[position]
        first = int(np.searchsorted(index.set, number))  # samples are ordered by set
        return SampleOrigin(
            data_set=data.manifest.sets[number].name, number=position - first + 1,
            shard=shards[index.shard[position]], row=int(index.row[position]),
        )  # fmt: skip

    return [place(int(position)) for position in positions[:MOST]]


def located(data: PreparedData, positions: Sequence[int]) -> list[SampleOrigin]:
    """Return the origins of training samples with object and line. Reads their shards."""
    found = origins_of(data, "train", positions)
    places = data.places(positions[:MOST])
    return [o.model_copy(update={"where": w}) for o, w in zip(found, places, strict=True)]


def in_words(places: Iterable[SampleOrigin]) -> str:
    """Format the first origins: ``samples 3, 17 of 'support'; sample 1 of 'notes'``."""
    sets: dict[str, list[int]] = {}
    for place in places:
        sets.setdefault(place.data_set, []).append(place.number)
    told = []
    for name, numbers in list(sets.items())[:_SETS]:
        shown = ", ".join(map(str, numbers[:_NUMBERS])) + ", …" * (len(numbers) > _NUMBERS)
        told.append(f"sample{'s' * (len(numbers) > 1)} {shown} of {name!r}")
    return "; ".join(told) + "; …" * (len(sets) > _SETS)
