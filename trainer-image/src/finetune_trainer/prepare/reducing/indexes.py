"""Writes the index of a side, and reads the indexed samples back, shard by shard."""

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
from finetune_trainer.prepared.dataset import INDEX_SCHEMA, index_name, shard_ids
from finetune_trainer.prepared.manifest import DataFile
from finetune_trainer.prepared.split import Side
from finetune_trainer.storage.objects import ObjectStore


@dataclass(frozen=True)
class IndexedShard:
    """The indexed samples of a shard."""

    path: Path
    """The shard's file, which whoever asked for it removes."""
    set: int
    """Number of their set."""
    first: int
    """Position in the index of the first of them."""
    rows: Rows
    """Their rows in the shard."""

    def tokens(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Tokens of these samples, one after the other, and where each begins, with the end of the
        last."""
        return _only(self.rows, *shard_ids(self.path))


class IndexWriter:
    """The index of one side, in a file until it is whole.

    Args:
        store: where the shards are and the index goes.
        uri: prefix of the prepared data.
        scratch: folder for files on their way.
        side: side of the split.
    """

    def __init__(self, store: ObjectStore, uri: str, scratch: Path, side: Side) -> None:
        self._store, self._uri, self._scratch, self._side = store, uri, scratch, side
        self._path = scratch / index_name(side)
        self._index = pa.ipc.new_file(str(self._path), INDEX_SCHEMA)
        self._places = scratch / f"places-{side}.txt"
        self._places.unlink(missing_ok=True)
        self._left_out: Rows = np.empty(0, np.int64)
        self._closed = False
        self._set = self._first_shard = 0
        self._ends: Rows = np.empty(0, np.int64)
        self.shards: list[ShardFile] = []
        """Files of the samples, in the order of the index' column ``shard``."""

    @property
    def files(self) -> list[DataFile]:
        """The shards, as the manifest has them."""
        return [DataFile(name=f.name, bytes=f.bytes, sha256=f.sha256) for f in self.shards]

    def begin_set(self, number: int) -> None:
        """The rows that follow are of this set."""
        self._set = number

    def begin_split(self, shards: Sequence[ShardFile]) -> None:
        """The rows that follow are of the input split with these shards."""
        self._first_shard = len(self.shards)
        self._ends = np.cumsum([0, *(file.samples for file in shards)])
        self.shards += shards

    def add(self, statistics: SampleStatistics, rows: Rows, numbers: Rows) -> None:
        """Append samples.

        Args:
            statistics: of some samples of the split.
            rows: which of them.
            numbers: the number of each among the samples that the split has for this side.
        """
        shard = np.searchsorted(self._ends, numbers, side="right") - 1
        columns: dict[str, Any] = {
            "set": np.full(len(rows), self._set),
            "length": statistics.numbers("length")[rows],
            "supervised": statistics.numbers("supervised")[rows],
            "shard": shard + self._first_shard,
            "row": numbers - self._ends[shard],
        }
        arrays = [pa.array(columns[f.name], f.type) for f in INDEX_SCHEMA]
        self._index.write_batch(pa.record_batch(arrays, schema=INDEX_SCHEMA))
        with self._places.open("a", encoding="utf-8", newline="\n") as file:
            places = statistics.texts("where", rows)
            file.writelines(place.replace("\n", " ") + "\n" for place in places)

    def leave_out(self, positions: Rows) -> tuple[Rows, Rows]:
        """Exclude the samples at these positions from the index.

        Returns:
            Length and learned tokens of each.
        """
        self._left_out = np.append(self._left_out, positions)
        rows = self._read()
        length, supervised = (rows[c].to_numpy()[positions] for c in ("length", "supervised"))
        return length, supervised

    def indexed_shards(self) -> Iterator[IndexedShard]:
        """The shards that hold indexed samples, read back from storage in the index' order."""
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
        """Object and line of the samples at some positions."""
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
            with pa.ipc.new_file(str(short), INDEX_SCHEMA) as file:
                file.write_table(table.filter(kept))
            short.replace(self._path)
        name = index_name(self._side)
        info = self._store.upload(self._path, f"{self._uri}/{name}")
        self._path.unlink()
        return DataFile(name=name, bytes=info.bytes, sha256=info.sha256)

    def _read(self) -> Any:
        """All rows; the file is mapped."""
        if not self._closed:
            self._index.close()
            self._closed = True
        return pa.ipc.open_file(pa.memory_map(str(self._path))).read_all()


def _only(
    rows: Rows, ids: npt.NDArray[np.int32], starts: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Tokens and starts of some of the samples of a shard."""
    lengths = np.diff(starts)
    if len(rows) == len(lengths):
        return ids, starts
    kept = np.zeros(len(lengths), np.bool_)
    kept[rows] = True
    short = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(lengths[kept], out=short[1:])
    return ids[starts[0] : starts[-1]][np.repeat(kept, lengths)], short
