"""Training samples that share a long n-gram of tokens with a held-out sample: a test that was
trained on measures memory.

n = 13 as in Brown et al., "Language Models are Few-Shot Learners", 2020, appendix C; of tokens, not
words. A shorter sample is compared as a whole. N-grams of many held-out samples are a template's,
and do not count. Hashes of 64 bits stand for n-grams: in about one run of 100, one of 10^9
n-grams is taken for another.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

NGRAM: Final = 13
"""Tokens of an n-gram."""

COMMON: Final = 10
"""Held-out samples above which an n-gram is a template's."""

COMMON_SHARE: Final = 0.1
"""The same, as a share of few held-out samples."""

HELD_OUT_NGRAMS: Final = 1 << 25
"""N-grams of held-out samples that are looked for: 256 MiB of hashes, twice that while they are
sorted. Held-out samples beyond are not compared."""

Hashes = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]

_PAD: Final = 0xFFFF_FFFF
"""Fills up samples of fewer than ``NGRAM`` tokens; no token has this number."""

# Random odd multipliers: equal hashes of different n-grams are then chance (multilinear hashing).
_FACTORS: Final = np.random.default_rng(13).integers(0, 1 << 64, NGRAM, np.uint64) | np.uint64(1)


def ngrams(ids: npt.NDArray[np.int32], starts: npt.NDArray[np.int32]) -> tuple[Hashes, Rows]:
    """Hashes of all n-grams of the samples of a shard, and the sample (row) of each.

    Args:
        ids: tokens of all samples, one after the other, shape [tokens].
        starts: where each sample begins, and the end of the last, shape [samples + 1].

    Returns:
        Two arrays of shape [n-grams], in the order of the tokens.
    """
    lengths = np.diff(starts)
    room = np.maximum(lengths, NGRAM)
    places = np.concatenate([[0], np.cumsum(room)])
    tokens = np.full(places[-1], _PAD, np.uint64)
    shift = np.repeat(places[:-1] - starts[:-1], lengths)
    tokens[np.arange(starts[0], starts[-1]) + shift] = ids[starts[0] : starts[-1]]
    count = max(0, len(tokens) - NGRAM + 1)
    hashes = np.zeros(count, np.uint64)
    for i, factor in enumerate(_FACTORS):
        hashes += tokens[i : i + count] * factor
    rows = np.repeat(np.arange(len(lengths)), room)
    within = rows[:count] == rows[NGRAM - 1 :]
    return hashes[within], rows[:count][within]


class Known:
    """A sorted set of hashes. Most of what is looked up is not in it, so a table of their upper
    bits (16 entries a hash, at most 64 MiB) is asked first, which is several times as fast."""

    def __init__(self, hashes: Hashes) -> None:
        self.hashes = hashes
        bits = min(26, max(16, (16 * len(hashes)).bit_length()))
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(1 << bits, np.bool_)
        self._table[hashes >> self._shift] = True

    def among(self, hashes: Hashes) -> Rows:
        """Which of some hashes are in the set, ascending."""
        likely = np.flatnonzero(self._table[hashes >> self._shift])
        if not len(likely):
            return likely
        at = np.minimum(np.searchsorted(self.hashes, hashes[likely]), len(self.hashes) - 1)
        return np.asarray(likely[self.hashes[at] == hashes[likely]], np.int64)


class HeldOut:
    """The n-grams of the held-out samples."""

    def __init__(self) -> None:
        self._hashes: list[Hashes] = []
        self._room = HELD_OUT_NGRAMS
        self.samples = 0
        """Held-out samples that were added."""

    @property
    def full(self) -> bool:
        """Whether no more samples are taken."""
        return self._room <= 0

    def add(self, ids: npt.NDArray[np.int32], starts: npt.NDArray[np.int32]) -> None:
        """Take the samples of a shard, each n-gram of a sample once."""
        hashes, rows = ngrams(ids, starts)
        order = np.lexsort((hashes, rows))
        hashes, rows = hashes[order], rows[order]
        fresh = np.ones(len(hashes), np.bool_)
        fresh[1:] = (hashes[1:] != hashes[:-1]) | (rows[1:] != rows[:-1])
        self._hashes.append(hashes[fresh])
        self._room -= int(fresh.sum())
        self.samples += len(starts) - 1

    def known(self) -> Known:
        """The n-grams that count. They are held no longer here."""
        every = np.concatenate([np.empty(0, np.uint64), *self._hashes])
        self._hashes = []
        every.sort()
        # The first of each run of equal hashes, if the run is not too long.
        most = most_common(self.samples)
        kept = np.ones(len(every), np.bool_)
        kept[1:] = every[1:] != every[:-1]
        kept[:-most] &= every[most:] != every[:-most]
        return Known(every[kept])


def most_common(samples: int) -> int:
    """Most held-out samples that an n-gram may occur in and still count."""
    return max(1, min(COMMON, int(COMMON_SHARE * samples)))


def first_shared(
    ids: npt.NDArray[np.int32], starts: npt.NDArray[np.int32], known: Known
) -> dict[int, npt.NDArray[np.int32]]:
    """The samples of a shard that hold a known n-gram: row to the first one's tokens."""
    hashes, rows = ngrams(ids, starts)
    shared = known.among(hashes)
    found, where = np.unique(rows[shared], return_index=True)
    first = np.concatenate([[0], np.cumsum(np.maximum(np.diff(starts) - NGRAM + 1, 1))])
    places: Any = starts[found] + shared[where] - first[found]
    return {
        int(row): ids[place : min(place + NGRAM, starts[row + 1])]
        for row, place in zip(found, places, strict=True)
    }
