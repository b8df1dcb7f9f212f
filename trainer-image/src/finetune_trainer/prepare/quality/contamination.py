"""Contamination: training samples that share a long n-gram of tokens with a held-out sample. A
held-out sample that was trained on measures memorization.

n = 13 as in Brown et al., "Language Models are Few-Shot Learners", 2020, appendix C; in tokens
instead of words. A shorter sample is compared as a whole. N-grams that occur in many held-out
samples of a set belong to a template and are ignored. N-grams are compared by 64-bit hashes: with
10^9 n-grams, about 1 run in 100 has a false match.
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
"""An n-gram in more held-out samples of a set than this belongs to a template."""

COMMON_SHARE: Final = 0.1
"""The same limit as a share of the samples, for small sets."""

HELD_OUT_NGRAMS: Final = 1 << 26
"""Maximum held-out n-grams: 0.5 GiB on disk. Further held-out samples are not compared."""

_PAD: Final = 0xFFFF_FFFF
"""Pads samples of fewer than ``NGRAM`` tokens; no token has this ID."""

# Multilinear hashing: random odd multipliers make collisions random.
_FACTORS: Final = np.random.default_rng(13).integers(0, 1 << 64, NGRAM, np.uint64) | np.uint64(1)


def ngrams(ids: npt.NDArray[np.int32], starts: npt.NDArray[np.int32]) -> tuple[Hashes, Rows]:
    """Return the hashes of all n-grams of the samples of a shard, and the sample (row) of each.

    Args:
        ids: concatenated tokens of all samples, shape [tokens].
        starts: start of each sample, and the end of the last, shape [samples + 1].

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
    """Collects the n-grams of the held-out samples.

    Args:
        folder: an empty folder for their hashes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._counted = HashCounter(folder)
        self._kept = HashCounter(folder / "kept")
        self._set_samples = 0
        self.samples = 0
        """Number of held-out samples added."""

    @property
    def full(self) -> bool:
        """Whether ``HELD_OUT_NGRAMS`` is reached: add no more samples."""
        return self._kept.added + self._counted.added >= HELD_OUT_NGRAMS

    def end_set(self) -> None:
        """End a set: templates are detected per set."""
        for hashes in self._counted.rare(most_common(self._set_samples)):
            self._kept.add(hashes)
        self._set_samples = 0

    def add(self, ids: npt.NDArray[np.int32], starts: npt.NDArray[np.int32]) -> None:
        """Add the samples of a shard. An n-gram counts once per sample."""
        hashes, rows = ngrams(ids, starts)
        order = np.lexsort((hashes, rows))
        hashes, rows = hashes[order], rows[order]
        fresh = np.ones(len(hashes), np.bool_)
        fresh[1:] = (hashes[1:] != hashes[:-1]) | (rows[1:] != rows[:-1])
        self._counted.add(hashes[fresh])
        self._set_samples += len(starts) - 1
        self.samples += len(starts) - 1

    def write(self) -> Path:
        """Write the n-grams outside templates to a file for ``HashSet``. Ends the collection."""
        self.end_set()
        path = self._folder / "known"
        HashSet.write(path, self._kept.rare(self.samples))
        return path


def most_common(samples: int) -> int:
    """Maximum samples, of a set of ``samples``, in which an n-gram outside a template occurs."""
    return max(1, min(COMMON, int(COMMON_SHARE * samples)))


def first_shared(
    ids: npt.NDArray[np.int32], starts: npt.NDArray[np.int32], known: HashSet
) -> dict[int, npt.NDArray[np.int32]]:
    """Find samples of a shard with a known n-gram; return the tokens of the first one, by row."""
    hashes, rows = ngrams(ids, starts)
    shared = known.among(hashes)
    found, where = np.unique(rows[shared], return_index=True)
    first = np.concatenate([[0], np.cumsum(np.maximum(np.diff(starts) - NGRAM + 1, 1))])
    places: Any = starts[found] + shared[where] - first[found]
    return {
        int(row): ids[place : min(place + NGRAM, starts[row + 1])]
        for row, place in zip(found, places, strict=True)
    }
