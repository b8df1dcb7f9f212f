"""Assigns records to sides of the split: a pure function of a record's group and the seed.

A record keeps its side when the data grows, and records of one group (equal prompts, or equal
values of ``groupBy``) are never separated.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

from finetune_api.sources import DATA_LISTS, Data, DataList

Side = DataList
SIDES: Final = DATA_LISTS
HELD_OUT: Final[tuple[Side, ...]] = ("validation", "test")
"""Sides whose samples must not be trained on."""
TESTED: Final[tuple[Side, ...]] = ("test", "retention")
"""Sides that base and tuned model are measured on at the end."""


@dataclass(frozen=True)
class Shares:
    """Held-out shares of the groups, each from 0 to 1, with a sum below 1."""

    validation: float
    test: float
    seed: int


def group_hash(group: str) -> int:
    """Return the hash of a group that tells groups apart: 64 bits of its BLAKE2b digest."""
    digest = hashlib.blake2b(group.encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


def position(seed: int, group: str) -> float:
    """Return the uniform position of a group in [0, 1): the first 53 bits of a keyed BLAKE2b
    digest."""
    key = seed.to_bytes(8, "little")
    digest = hashlib.blake2b(group.encode("utf-8", "surrogatepass"), digest_size=8, key=key)
    return (int.from_bytes(digest.digest(), "big") >> 11) / 2.0**53


def side_of(group: str, shares: Shares) -> Side:
    """Return the side of a group. Test has the lowest positions, so that a change of the validation
    share moves no record into or out of the test set."""
    at = position(shares.seed, group)
    if at < shares.test:
        return "test"
    return "validation" if at < shares.test + shares.validation else "train"


def shares_of(data: Data, side: Side, canaries: bool = False) -> Shares | None:
    """Return the held-out shares of a source: None for a source of another list, or of canaries; a
    share is 0 where a set of its own is given."""
    if side != "train" or canaries:
        return None
    return Shares(
        validation=0.0 if data.validation else float(data.split.validation),
        test=0.0 if data.test else float(data.split.test),
        seed=data.split.seed,
    )
