"""A set of 64-bit hashes that lies on disk: memory neither to make it nor to ask it grows with it.

    add ─(upper bits)→ 64 files ─(each sorted)→ one sorted file, and a table

Most of what is asked for is not in the set, so a table of upper bits is asked first. What passes it
is looked up by binary search.
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
"""Upper bits of a hash by which the table knows it: 8 MiB. Of hashes that are not in the set, 1 of
10 passes where it has 7 million, 2 of 3 where it has 67."""

_PART_BITS: Final = 6
_FIRSTS: Final = np.arange(1 << _PART_BITS, dtype=np.uint64) << np.uint64(64 - _PART_BITS)
"""The least hash of each file while they are added."""


class HashCounter:
    """Notes hashes on disk, to find those that occur seldom.

    Args:
        folder: for its files; it is made where it is absent.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self.added = 0
        """Hashes that were added, equal ones too."""

    def add(self, hashes: Hashes) -> None:
        """Count each of some hashes once more."""
        ordered = np.sort(hashes)
        cuts = [*np.searchsorted(ordered, _FIRSTS).tolist(), len(ordered)]
        for number, (first, end) in enumerate(pairwise(cuts)):
            with self._part(number).open("ab") as file:
                ordered[first:end].tofile(file)
        self.added += len(hashes)

    def seldom(self, most: int) -> Iterator[Hashes]:
        """The hashes that were added at most so many times, each once, ascending, some at a time.
        Then it is empty."""
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
    """A sorted file of hashes and the table beside it, both mapped: the processes that ask share
    one copy in memory.

    Args:
        path: the file, as ``write`` made it.
    """

    def __init__(self, path: Path) -> None:
        self._table = np.memmap(path.with_suffix(".table"), np.uint8, "r")
        self._hashes: Hashes = np.empty(0, np.uint64)
        if path.stat().st_size:
            self._hashes = np.memmap(path, np.uint64, "r")

    @classmethod
    def write(cls, path: Path, ascending: Iterable[Hashes]) -> HashSet:
        """Make the files.

        Args:
            ascending: the hashes, some at a time.
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
        """Which of some hashes are in the set, ascending."""
        byte, bit = _in_table(hashes)
        likely = np.flatnonzero(self._table[byte] & bit)
        if not len(self._hashes):
            return likely[:0]
        wanted = hashes[likely]
        at = np.minimum(np.searchsorted(self._hashes, wanted), len(self._hashes) - 1)
        found: Rows = likely[self._hashes[at] == wanted]
        return found


def _in_table(hashes: Hashes) -> tuple[Hashes, npt.NDArray[np.uint8]]:
    """Byte and bit of each hash."""
    upper = hashes >> np.uint64(64 - _TABLE_BITS)
    return upper >> np.uint64(3), np.left_shift(1, upper & np.uint64(7)).astype(np.uint8)
