"""Writes the index of a side, and reads indexed samples back by shard."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from finetune_trainer.prepare.mapping.statistics import SampleStatistics, ShardFile
from finetune_trainer.prepare.reducing.report import Rows
from finetune_trainer.prepared.dataset import index_name, index_schema, shard_ids
from finetune_trainer.prepared.manifest import DataFile
from finetune_trainer.prepared.split import Side
from finetune_trainer.storage.objects import ObjectStore


@dataclass(frozen=True)
class IndexedShard:
    """The indexed samples of a shard."""

    path: Path
    """Local file of the shard. The caller deletes it."""
    set: int
    """Number of the samples' set."""
    first: int
    """Position of the first sample in the index."""
    rows: Rows
    """Rows of the samples in the shard."""

    def tokens(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Concatenated tokens of the samples, and the start of each with the end of the last."""
        return _only(self.rows, *shard_ids(self.path))


class GroupNumbers:
    """Numbers the groups of one side, in the order of the data. The index has these numbers instead
    of the hashes: a hash of a customer's address would tell who it is."""

    def __init__(self) -> None:
        self._known: dict[int, int] = {}

    def of(self, hashes: Sequence[int]) -> list[int]:
        """Return the number of each sample's group.

        Args:
            hashes: of the groups.
        """
        return [self._known.setdefault(found, len(self._known)) for found in hashes]


class IndexWriter:
    """Writes the index of one side, in a local file until it is complete.

    Args:
        store: storage of the shards and the index.
        uri: prefix of the prepared data.
        scratch: local folder for temporary files.
        side: side of the split.
    """

    def __init__(self, store: ObjectStore, uri: str, scratch: Path, side: Side) -> None:
        self._store, self._uri, self._scratch, self._side = store, uri, scratch, side
        self._path = scratch / index_name(side)
        self._schema = index_schema(side)
        self._index = pa.ipc.new_file(str(self._path), self._schema)
        self._groups = GroupNumbers()
        self._places = scratch / f"places-{side}.txt"
        self._places.unlink(missing_ok=True)
        self._left_out: Rows = np.empty(0, np.int64)
        self._closed = False
        self._set = self._first_shard = 0
        self._ends: Rows = np.empty(0, np.int64)
        self.shards: list[ShardFile] = []
        """Shard files; the index column ``shard`` is a position in this list."""

    @property
    def files(self) -> list[DataFile]:
        """The shards, as manifest entries."""
        return [DataFile(name=f.name, bytes=f.bytes, sha256=f.sha256) for f in self.shards]

    def begin_set(self, number: int) -> None:
        """Begin a set."""
        self._set = number

    def begin_split(self, shards: Sequence[ShardFile]) -> None:
        """Begin an input split.

        Args:
            shards: its shards of this side.
        """
        self._first_shard = len(self.shards)
        self._ends = np.cumsum([0, *(file.samples for file in shards)])
        self.shards += shards

    def add(self, statistics: SampleStatistics, rows: Rows, numbers: Rows) -> None:
        """Append samples of the input split.

        Args:
            statistics: a batch of the split's statistics.
            rows: rows of the samples in it.
            numbers: number of each sample among the split's samples of this side.
        """
        shard = np.searchsorted(self._ends, numbers, side="right") - 1
        columns: dict[str, Any] = {
            "set": np.full(len(rows), self._set),
            "length": statistics.numbers("length")[rows],
            "supervised": statistics.numbers("supervised")[rows],
            "shard": shard + self._first_shard,
            "row": numbers - self._ends[shard],
        }
        if "group" in self._schema.names:
            columns["group"] = self._groups.of(statistics.groups(rows))
        arrays = [pa.array(columns[f.name], f.type) for f in self._schema]
        self._index.write_batch(pa.record_batch(arrays, schema=self._schema))
        with self._places.open("a", encoding="utf-8", newline="\n") as file:
            places = statistics.texts("where", rows)
            file.writelines(place.replace("\n", " ") + "\n" for place in places)

    def leave_out(self, positions: Rows) -> tuple[Rows, Rows]:
        """Exclude the samples at these positions from the index.

        Returns:
            Length and supervised tokens of each.
        """
        self._left_out = np.append(self._left_out, positions)
        rows = self._read()
        length, supervised = (rows[c].to_numpy()[positions] for c in ("length", "supervised"))
        return length, supervised

    def indexed_shards(self) -> Iterator[IndexedShard]:
        """Download and yield the shards with indexed samples, in the order of the index."""
        table = self._read()
        if not len(table):
            return
        shard, row, number = (table[c].to_numpy() for c in ("shard", "row", "set"))
        bounds = np.searchsorted(shard, np.arange(len(self.shards) + 1))
        for i, file in enumerate(self.shards):
            first, end = int(bounds[i]), int(bounds[i + 1])
            if first < end:
                path = self._scratch / f"read-{i}.arrow"
                self._store.download(f"{self._uri}/{file.name}", path)
                yield IndexedShard(path, int(number[first]), first, row[first:end])

    def places(self, positions: Collection[int]) -> dict[int, str]:
        """Return object and line of the samples at ``positions``, by position."""
        if not positions:
            return {}
        with self._places.open(encoding="utf-8", newline="\n") as lines:
            return {i: line.rstrip("\n") for i, line in enumerate(lines) if i in positions}

    def finish(self) -> DataFile:
        """Write the index to storage."""
        table = self._read()
        if len(self._left_out):
            kept = np.ones(len(table), np.bool_)
            kept[self._left_out] = False
            short = self._path.with_suffix(".short")
            with pa.ipc.new_file(str(short), self._schema) as file:
                file.write_table(table.filter(kept))
            short.replace(self._path)
        name = index_name(self._side)
        info = self._store.upload(self._path, f"{self._uri}/{name}")
        self._path.unlink()
        return DataFile(name=name, bytes=info.bytes, sha256=info.sha256)

    def _read(self) -> Any:
        """Return all rows as a memory-mapped table. Closes the index file on the first call."""
        if not self._closed:
            self._index.close()
            self._closed = True
        return pa.ipc.open_file(pa.memory_map(str(self._path))).read_all()


def _only(
    rows: Rows, ids: npt.NDArray[np.int32], starts: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Return tokens and starts of the samples of a shard at ``rows``."""
    lengths = np.diff(starts)
    if len(rows) == len(lengths):
        return ids, starts
    kept = np.zeros(len(lengths), np.bool_)
    kept[rows] = True
    short = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(lengths[kept], out=short[1:])
    return ids[starts[0] : starts[-1]][np.repeat(kept, lengths)], short
