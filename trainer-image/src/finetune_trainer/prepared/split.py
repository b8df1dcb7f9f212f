"""Which side of the split a record falls on: a pure function of its group and the seed.

No state and no counts: a record keeps its side as the data grows, and records of one group
(equal prompts, or equal values of ``groupBy``) are never separated.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final, Literal

from finetune_api.sources import Data

Side = Literal["train", "validation", "test"]
SIDES: Final[tuple[Side, ...]] = ("train", "validation", "test")


@dataclass(frozen=True)
class Shares:
    """Shares of the groups that are held out, each from 0 to 1, together below 1."""

    validation: float
    test: float
    seed: int


def position(seed: int, group: str) -> float:
    """Uniform position of a group in [0, 1): the first 53 bits of a keyed BLAKE2b digest."""
    key = seed.to_bytes(8, "little")
    digest = hashlib.blake2b(group.encode("utf-8", "surrogatepass"), digest_size=8, key=key)
    return (int.from_bytes(digest.digest(), "big") >> 11) / 2.0**53


def side_of(group: str, shares: Shares) -> Side:
    """The side of a group. Test lies lowest, so that a change of the validation share moves no
    record into or out of the test set."""
    at = position(shares.seed, group)
    if at < shares.test:
        return "test"
    return "validation" if at < shares.test + shares.validation else "train"


def shares_of(data: Data, side: Side) -> Shares | None:
    """What is held out of a source: nothing of a set for validation or test, and no share for
    which a set is given."""
    if side != "train":
        return None
    return Shares(
        validation=0.0 if data.validation else float(data.split.validation),
        test=0.0 if data.test else float(data.split.test),
        seed=data.split.seed,
    )
