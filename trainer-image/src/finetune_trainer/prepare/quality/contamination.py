"""Training samples that share a long n-gram of tokens with a held-out sample: a test that was
trained on measures memory.

n = 13 as in Brown et al., "Language Models are Few-Shot Learners", 2020, appendix C; of tokens, not
words. A shorter sample is compared as a whole. N-grams of many held-out samples of a set are a
template's, and do not count. Hashes of 64 bits stand for n-grams: in about one run of 100, one of
10^9 n-grams is taken for another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from finetune_trainer.prepare.quality.hashsets import HashCounter, Hashes, HashSet, Rows

NGRAM: Final = 13
"""Tokens of an n-gram."""

COMMON: Final = 10
"""Held-out samples of a set above which an n-gram is a template's."""

COMMON_SHARE: Final = 0.1
"""The same, as a share of few held-out samples."""

HELD_OUT_NGRAMS: Final = 1 << 26
"""N-grams of held-out samples that are looked for: 0.5 GiB on disk. Held-out samples beyond are not
compared."""

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


class HeldOut:
    """The n-grams of the held-out samples.

    Args:
        folder: an empty one, for their hashes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._counted = HashCounter(folder)
        self._kept = HashCounter(folder / "kept")
        self._set_samples = 0
        self.samples = 0
        """Held-out samples that were added."""

    @property
    def full(self) -> bool:
        """Whether no more samples are taken."""
        return self._kept.added + self._counted.added >= HELD_OUT_NGRAMS

    def end_set(self) -> None:
        """The samples that follow are of another set: a template is that of a set."""
        for hashes in self._counted.seldom(most_common(self._set_samples)):
            self._kept.add(hashes)
        self._set_samples = 0

    def add(self, ids: npt.NDArray[np.int32], starts: npt.NDArray[np.int32]) -> None:
        """Take the samples of a shard, each n-gram of a sample once."""
        hashes, rows = ngrams(ids, starts)
        order = np.lexsort((hashes, rows))
        hashes, rows = hashes[order], rows[order]
        fresh = np.ones(len(hashes), np.bool_)
        fresh[1:] = (hashes[1:] != hashes[:-1]) | (rows[1:] != rows[:-1])
        self._counted.add(hashes[fresh])
        self._set_samples += len(starts) - 1
        self.samples += len(starts) - 1

    def write(self) -> Path:
        """The file of the n-grams that count, for ``HashSet``. No more samples are taken."""
        self.end_set()
        path = self._folder / "known"
        HashSet.write(path, self._kept.seldom(self.samples))
        return path


def most_common(samples: int) -> int:
    """Most of so many held-out samples of a set that an n-gram may occur in and still count."""
    return max(1, min(COMMON, int(COMMON_SHARE * samples)))


def first_shared(
    ids: npt.NDArray[np.int32], starts: npt.NDArray[np.int32], known: HashSet
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
