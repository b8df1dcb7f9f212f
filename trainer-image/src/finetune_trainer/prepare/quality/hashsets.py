"""A set of 64-bit hashes on disk. The memory to build and query it does not grow with its size.

    add ─(upper bits)→ 64 files ─(each sorted)→ one sorted file, and a table

Most queried hashes are not in the set, so a bit table of upper bits filters them first. The rest is
looked up by binary search.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]

_TABLE_BITS: Final = 26
"""Upper bits of a hash that index the table: 8 MiB. Of hashes outside the set, 1 in 10 passes with
7 million hashes in the set, 2 in 3 with 67 million."""

_PART_BITS: Final = 6
_FIRSTS: Final = np.arange(1 << _PART_BITS, dtype=np.uint64) << np.uint64(64 - _PART_BITS)
"""The lowest hash of each file of a ``HashCounter``."""


class HashCounter:
    """Records hashes on disk, to find the rare ones.

    Args:
        folder: for its files; created if absent.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self.added = 0
        """Number of hashes added, with repetitions."""

    def add(self, hashes: Hashes) -> None:
        """Add one occurrence of each hash."""
        ordered = np.sort(hashes)
        cuts = [*np.searchsorted(ordered, _FIRSTS).tolist(), len(ordered)]
        for number, (first, end) in enumerate(pairwise(cuts)):
            with self._part(number).open("ab") as file:
                ordered[first:end].tofile(file)
        self.added += len(hashes)

    def rare(self, most: int) -> Iterator[Hashes]:
        """Yield the distinct hashes added at most ``most`` times, ascending, in chunks. Empties
        the counter."""
        for part in filter(Path.exists, map(self._part, range(len(_FIRSTS)))):
            hashes = np.fromfile(part, np.uint64)
            part.unlink()
            hashes.sort()
            # The first of each run of equal hashes, if the run is not too long.
            kept = np.ones(len(hashes), np.bool_)
            kept[1:] = hashes[1:] != hashes[:-1]
            kept[:-most] &= hashes[most:] != hashes[:-most]
            yield hashes[kept]
        self.added = 0

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number:02d}"


class HashSet:
    """A sorted file of hashes and its table, both memory-mapped: processes share one copy.

    Args:
        path: file written by ``write``.
    """

    def __init__(self, path: Path) -> None:
        self._table = np.memmap(path.with_suffix(".table"), np.uint8, "r")
        self._hashes: Hashes = np.empty(0, np.uint64)
        if path.stat().st_size:
            self._hashes = np.memmap(path, np.uint64, "r")

    @classmethod
    def write(cls, path: Path, ascending: Iterable[Hashes]) -> HashSet:
        """Write the files.

        Args:
            ascending: the hashes in ascending order, in chunks.
        """
        table = np.zeros(1 << (_TABLE_BITS - 3), np.uint8)
        with path.open("wb") as file:
            for hashes in ascending:
                hashes.tofile(file)
                np.bitwise_or.at(table, *_in_table(hashes))
        table.tofile(path.with_suffix(".table"))
        return cls(path)

    def __len__(self) -> int:
        return len(self._hashes)

    def among(self, hashes: Hashes) -> Rows:
        """Indices of the hashes that are in the set, ascending."""
        byte, bit = _in_table(hashes)
        likely = np.flatnonzero(self._table[byte] & bit)
        if not len(self._hashes):
            return likely[:0]
        wanted = hashes[likely]
        at = np.minimum(np.searchsorted(self._hashes, wanted), len(self._hashes) - 1)
        found: Rows = likely[self._hashes[at] == wanted]
        return found


def _in_table(hashes: Hashes) -> tuple[Hashes, npt.NDArray[np.uint8]]:
    """Byte index and bit mask of each hash in the table."""
    upper = hashes >> np.uint64(64 - _TABLE_BITS)
    return upper >> np.uint64(3), np.left_shift(1, upper & np.uint64(7)).astype(np.uint8)
