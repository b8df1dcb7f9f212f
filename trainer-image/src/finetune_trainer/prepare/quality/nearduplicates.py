"""Detection of near duplicates, with 128 bytes of memory per record (128 MB per million).

A record is a set of shingles: three consecutive words of its own text (``RenderedExample.own``). A
MinHash signature (Broder, "On the resemblance and containment of documents", 1997) of 128 values
estimates the Jaccard similarity of two sets: the share of equal values. Stored per record:

- 8 words of 8 bytes: band hashes, for locality-sensitive hashing (Leskovec, Rajaraman, Ullman,
  "Mining of Massive Datasets", section 3.4). A band is a group of r signature values; records of
  similarity s share one of b bands with probability 1 - (1 - s^r)^b, an S-curve. r is the largest
  value with which 9 of 10 pairs at the threshold share a band (8 at 0.85; 99 % of pairs at 0.9).
- 64 bytes: the lowest 4 bits of each signature value (Li and König, "b-bit minwise hashing",
  2010). If m of the n values of two records are equal, and 1 in 16 is equal by chance, the
  similarity is (m/n - 1/16) / (1 - 1/16), with a standard error of about 0.03 at 0.85. It is
  computed for records that share a band. Bands alone would also drop less similar records,
  increasingly so with more data.

Band hashes are stored in sorted arrays, each at most half as long as the one before, as in
``duplicates``. While arrays are merged, their memory doubles.
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
"""Words of a shingle: one changed word in a text of about 40 gives a similarity of 0.85."""

MET: Final = 0.9
"""Minimum probability that a pair at the threshold shares a band."""

BUCKET: Final = 64
"""Maximum records per band hash that a record is compared with: bounds the time."""

Words = npt.NDArray[np.uint64]

_NIBBLES: Final = VALUES // 16
"""64-bit words for the low bits of a signature, 16 values each."""

FINGERPRINT: Final = BANDS + _NIBBLES
"""64-bit words stored per record."""

# In scripts without spaces (Thai, Lao, Burmese, Khmer, Japanese, Chinese) a character is a word.
_UNSPACED: Final = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
_WORD: Final = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def shingles(text: str) -> set[str]:
    """Return the shingles of a text in lower case; a shorter text is one shingle."""
    words = _WORD.findall(text.lower()) or [text]
    last = max(1, len(words) - SHINGLE + 1)
    return {" ".join(words[i : i + SHINGLE]) for i in range(last)}


def rows_for(threshold: float) -> int:
    """Return the values per band: the largest number with which a pair at the threshold shares a
    band with probability ``MET``."""
    enough = 1 - (1 - MET) ** (1 / BANDS)
    most = VALUES // BANDS
    if threshold >= 1:
        return most
    return max(1, min(most, math.floor(math.log(enough) / math.log(threshold))))


def signature(text: str) -> npt.NDArray[np.uint32]:
    """Return the MinHash signature of a text's shingles, shape [VALUES]."""
    minhash = MinHash(num_perm=VALUES, scheme="affine32", hashfunc=zlib.crc32)
    minhash.update_batch([s.encode("utf-8", "surrogatepass") for s in shingles(text)])
    return np.asarray(minhash.hashvalues, np.uint32)


def similarity(low: Words, others: Words) -> npt.NDArray[np.float64]:
    """Estimate the Jaccard similarity of a record to others, shape [records].

    Args:
        low: packed low bits of the record, shape [words].
        others: packed low bits of the others, shape [records, words].
    """
    differing = low ^ others
    differing |= differing >> np.uint64(2)
    differing |= differing >> np.uint64(1)
    ones = np.bitwise_count(differing & np.uint64(0x1111_1111_1111_1111))
    equal = 1 - ones.sum(axis=1, dtype=np.int64) / VALUES
    return np.asarray((equal - 1 / 16) / (1 - 1 / 16), np.float64)


def fingerprints(texts: Sequence[str], threshold: float) -> Words:
    """Return band hashes and low bits of each text, shape [texts, FINGERPRINT].

    Args:
        threshold: see ``SeenFingerprints``.
    """
    if not texts:
        return np.empty((0, FINGERPRINT), np.uint64)
    different = {text: signature(text) for text in dict.fromkeys(texts)}
    signatures = np.stack([different[text] for text in texts])
    return np.hstack([_band_keys(signatures, rows_for(threshold)), _low_bits(signatures)])


class SeenFingerprints:
    """The records seen so far, to find near duplicates of them.

    Args:
        threshold: minimum similarity of near duplicates, above 0 and at most 1.
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
        """Add the ``fingerprints`` of a batch of texts; return whether each is a near duplicate of
        an earlier text, in this batch or before. Near duplicates are not stored."""
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
        """For each record of a batch, the numbers of stored records that share a band with it."""
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
    """Return band hashes in the upper 32 bits, shape [records, BANDS]; the lower 32 are for the
    number of the record. A collision costs one comparison and has no other effect."""
    salts = np.random.default_rng(0).integers(0, 1 << 64, (BANDS, rows), np.uint64, endpoint=False)
    bands = signatures[:, : BANDS * rows].reshape(-1, BANDS, rows)
    mixed = (bands.astype(np.uint64) * salts).sum(axis=2, dtype=np.uint64)
    return np.asarray(mixed >> np.uint64(32) << np.uint64(32), np.uint64)


def _low_bits(signatures: npt.NDArray[np.uint32]) -> Words:
    """Return the lowest 4 bits of each value, 16 values per word, shape [records, words]."""
    values = (signatures & np.uint32(15)).astype(np.uint64).reshape(-1, _NIBBLES, 16)
    shifts: Any = np.arange(0, 64, 4, dtype=np.uint64)
    return np.asarray(np.bitwise_or.reduce(values << shifts, axis=2), np.uint64)
