"""Detection of exact duplicates, with 16 bytes of memory per record.

Digests are stored in sorted arrays, each at most half as long as the one before (a log-structured
set). This avoids a Python object per digest, and a batch takes a few binary searches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

DIGEST_BYTES: Final = 16
Words = npt.NDArray[np.uint64]


def digest_of(texts: Iterable[str]) -> bytes:
    """Return the 16-byte digest of a sequence of texts. It covers their lengths, so ("ab", "c")
    and ("a", "bc") differ."""
    state = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.digest()


@dataclass(frozen=True)
class _Level:
    """Digests as two 64-bit words each, sorted by the first word."""

    first: Words
    second: Words

    def holds(self, first: Words, second: Words) -> npt.NDArray[np.bool_]:
        left = np.searchsorted(self.first, first, side="left")
        right = np.searchsorted(self.first, first, side="right")
        found = np.zeros(len(first), np.bool_)
        for i in np.flatnonzero(left < right):
            found[i] = (self.second[left[i] : right[i]] == second[i]).any()
        return found


class Seen:
    """The set of digests seen so far."""

    def __init__(self) -> None:
        self._levels: list[_Level] = []

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(level.first.nbytes + level.second.nbytes for level in self._levels)

    def known(self, digests: Sequence[bytes]) -> list[bool]:
        """Whether each 16-byte digest was seen before."""
        return [bool(k) for k in self._holds(*_words(digests))]

    def add(self, digests: Sequence[bytes]) -> list[bool]:
        """Add a batch of 16-byte digests; return whether each was seen before, in this batch or an
        earlier one."""
        first, second = _words(digests)
        known = self._holds(first, second)
        batch: set[bytes] = set()
        for i, digest in enumerate(digests):
            known[i] |= digest in batch
            batch.add(digest)
        fresh = ~known
        if fresh.any():
            self._push(first[fresh], second[fresh])
        return [bool(k) for k in known]

    def _holds(self, first: Words, second: Words) -> npt.NDArray[np.bool_]:
        known = np.zeros(len(first), np.bool_)
        for level in self._levels:
            known |= level.holds(first, second)
        return known

    def _push(self, first: Words, second: Words) -> None:
        while self._levels and len(self._levels[-1].first) < 2 * len(first):
            last = self._levels.pop()
            first = np.concatenate([last.first, first])
            second = np.concatenate([last.second, second])
        order = np.argsort(first, kind="stable")
        self._levels.append(_Level(first[order], second[order]))


def _words(digests: Sequence[bytes]) -> tuple[Words, Words]:
    words = np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2).astype(np.uint64)
    return words[:, 0], words[:, 1]
