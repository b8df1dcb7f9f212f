"""Near duplicates, remembered in 128 bytes a record (128 MB a million).

Records are sets of shingles: three of their own words (``RenderedExample.own``) in a row. A MinHash
signature (Broder, "On the resemblance and containment of documents", 1997) of 128 values estimates
the Jaccard similarity of two sets: the share of equal values. Two things are kept of a record:

- 8 words of 8 bytes: band hashes, for locality-sensitive hashing (Leskovec, Rajaraman, Ullman,
  "Mining of Massive Datasets", section 3.4). A band is a row of signature values, and records of
  similarity s share one of b bands of r values with probability 1 - (1 - s^r)^b, an S-curve. r is
  the largest with which 9 of 10 pairs at the threshold meet (8 at 0.85; at 0.9 similarity, 99 %).
- 64 bytes: the lowest 4 bits of each signature value (Li and König, "b-bit minwise hashing",
  2010). Of records that share a band, m of these n values are equal, by chance alone 1 in 16, so
  the similarity is (m/n - 1/16) / (1 - 1/16), with a standard error of about 0.03 at 0.85. Bands
  alone would also drop records that are less alike, the more the longer the data is.

Band hashes lie in sorted arrays, each at most half as long as the one before, as exact duplicates
do; while arrays are merged, memory is up to twice that.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from datasketch import MinHash

VALUES: Final = 128
"""Values of a signature."""

BANDS: Final = 8
SHINGLE: Final = 3
"""Words of a shingle: one changed word in a text of about 40 makes a similarity of 0.85."""

MET: Final = 0.9
"""Least probability that a pair at the threshold shares a band."""

BUCKET: Final = 64
"""Most records of one band hash that a record is compared with: bounds the time."""

Words = npt.NDArray[np.uint64]

_NIBBLES: Final = VALUES // 16
"""Words that hold the low bits of a signature, 16 values each."""

FINGERPRINT: Final = BANDS + _NIBBLES
"""Words that are remembered of a record."""

# Scripts without spaces (Thai, Lao, Burmese, Khmer, Japanese, Chinese) are cut into characters.
_UNSPACED: Final = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
_WORD: Final = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def shingles(text: str) -> set[str]:
    """Rows of ``SHINGLE`` words, in lower case; of a shorter text, the text itself."""
    words = _WORD.findall(text.lower()) or [text]
    last = max(1, len(words) - SHINGLE + 1)
    return {" ".join(words[i : i + SHINGLE]) for i in range(last)}


def rows_for(threshold: float) -> int:
    """Values of a band: the most with which pairs at the threshold share one of the bands with
    probability ``MET``."""
    enough = 1 - (1 - MET) ** (1 / BANDS)
    most = VALUES // BANDS
    if threshold >= 1:
        return most
    return max(1, min(most, math.floor(math.log(enough) / math.log(threshold))))


def signature(text: str) -> npt.NDArray[np.uint32]:
    """MinHash signature of a text's shingles, shape [VALUES]."""
    minhash = MinHash(num_perm=VALUES, scheme="affine32", hashfunc=zlib.crc32)
    minhash.update_batch([s.encode("utf-8", "surrogatepass") for s in shingles(text)])
    return np.asarray(minhash.hashvalues, np.uint32)


def similarity(low: Words, others: Words) -> npt.NDArray[np.float64]:
    """Estimated Jaccard similarity of packed low bits, shape [words], to others, shape
    [records, words]."""
    differing = low ^ others
    differing |= differing >> np.uint64(2)
    differing |= differing >> np.uint64(1)
    ones = np.bitwise_count(differing & np.uint64(0x1111_1111_1111_1111))
    equal = 1 - ones.sum(axis=1, dtype=np.int64) / VALUES
    return np.asarray((equal - 1 / 16) / (1 - 1 / 16), np.float64)


def fingerprints(texts: Sequence[str], threshold: float) -> Words:
    """All that is remembered of each text, shape [texts, FINGERPRINT].

    Args:
        threshold: as ``SeenAlike`` has it.
    """
    if not texts:
        return np.empty((0, FINGERPRINT), np.uint64)
    different = {text: signature(text) for text in dict.fromkeys(texts)}
    signatures = np.stack([different[text] for text in texts])
    return np.hstack([_band_keys(signatures, rows_for(threshold)), _low_bits(signatures)])


class SeenAlike:
    """The records that came before, and whether a new one is like one of them.

    Args:
        threshold: least similarity of near duplicates, above 0 and at most 1.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._low: Words = np.empty((1024, _NIBBLES), np.uint64)
        self._records = 0
        self._levels: list[Words] = []

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return self._low.nbytes + sum(level.nbytes for level in self._levels)

    def add(self, prints: Words) -> list[bool]:
        """Remember the ``fingerprints`` of a batch of texts; True at those that are like an
        earlier one, of this batch or another: they are not remembered themselves."""
        keys, low = prints[:, :BANDS], prints[:, BANDS:]
        earlier = self._candidates(keys)
        batch: dict[int, list[int]] = defaultdict(list)
        added: list[Words] = []
        known = []
        for key, bits, candidates in zip(keys, low, earlier, strict=True):
            own = [int(k) for k in key]
            near = [*candidates, *(number for k in own for number in batch[k][:BUCKET])]
            alike = bool(near) and bool(
                (similarity(bits, self._low[list(set(near))]) >= self._threshold).any()
            )
            known.append(alike)
            if not alike:
                number = self._remember(bits)
                added.append(key | np.uint64(number))
                for k in own:
                    batch[k].append(number)
        if added:
            self._push(np.concatenate(added))
        return known

    def _candidates(self, keys: Words) -> list[list[int]]:
        """Numbers of the records that share a band with each of a batch."""
        found: list[list[int]] = [[] for _ in keys]
        flat = keys.reshape(-1)
        for level in self._levels:
            left = np.searchsorted(level, flat, side="left")
            right = np.searchsorted(level, flat | np.uint64(0xFFFF_FFFF), side="right")
            for i in np.flatnonzero(left < right):
                some = level[left[i] : min(right[i], left[i] + BUCKET)]
                found[i // BANDS] += (some & np.uint64(0xFFFF_FFFF)).tolist()
        return found

    def _remember(self, bits: Words) -> int:
        if self._records == len(self._low):
            fresh = np.empty((self._records * 3 // 2, _NIBBLES), np.uint64)
            fresh[: self._records] = self._low
            self._low = fresh
        self._low[self._records] = bits
        self._records += 1
        return self._records - 1

    def _push(self, keys: Words) -> None:
        while self._levels and len(self._levels[-1]) < 2 * len(keys):
            keys = np.concatenate([self._levels.pop(), keys])
        self._levels.append(np.sort(keys))


def _band_keys(signatures: npt.NDArray[np.uint32], rows: int) -> Words:
    """Band hashes in the upper 32 bits, shape [records, BANDS]; the number of a record goes
    below. A hash that two bands have by chance costs a comparison, no more."""
    salts = np.random.default_rng(0).integers(0, 1 << 64, (BANDS, rows), np.uint64, endpoint=False)
    bands = signatures[:, : BANDS * rows].reshape(-1, BANDS, rows)
    mixed = (bands.astype(np.uint64) * salts).sum(axis=2, dtype=np.uint64)
    return np.asarray(mixed >> np.uint64(32) << np.uint64(32), np.uint64)


def _low_bits(signatures: npt.NDArray[np.uint32]) -> Words:
    """The lowest 4 bits of each value, 16 values a word, shape [records, words]."""
    values = (signatures & np.uint32(15)).astype(np.uint64).reshape(-1, _NIBBLES, 16)
    shifts: Any = np.arange(0, 64, 4, dtype=np.uint64)
    return np.asarray(np.bitwise_or.reduce(values << shifts, axis=2), np.uint64)
