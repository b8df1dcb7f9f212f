"""Writes samples to shards, and shards to storage as they fill: memory holds one shard a split."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from finetune_trainer.prepare.tokens import Sample
from finetune_trainer.prepared.manifest import DataFile
from finetune_trainer.prepared.shards import (
    INDEX_SCHEMA,
    REFERENCE_SCHEMA,
    TOKEN_SCHEMA,
    index_name,
    shard_ids,
    shard_name,
)
from finetune_trainer.prepared.split import Side
from finetune_trainer.storage.objects import ObjectStore

SHARD_TOKENS: Final = 4 << 20
"""Tokens at which a shard is closed: 16 MiB, one multipart upload's part."""

SHARD_ROWS: Final = 1 << 16
"""Samples at which a shard is closed, however short they are."""


Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class WrittenShard:
    """The tokens of a shard that is in storage."""

    set: int
    """Number of its set."""
    first: int
    """Position of its first sample, of all that were added to the split."""
    ids: npt.NDArray[np.int32]
    """Tokens of all its samples, one after the other."""
    starts: npt.NDArray[np.int32]
    """Where each sample begins, and the end of the last."""


class SplitWriter:
    """Writes the samples of one split, set after set.

    Args:
        store: where the files go.
        uri: prefix of the prepared data.
        scratch: folder for the files that are being written.
        split: the split.
    """

    def __init__(self, store: ObjectStore, uri: str, scratch: Path, split: Side) -> None:
        self._store, self._uri, self._scratch, self._split = store, uri, scratch, split
        self._places = scratch / f"places-{split}.txt"
        self._places.unlink(missing_ok=True)
        self._schema = TOKEN_SCHEMA if split == "train" else REFERENCE_SCHEMA
        self._index_path = scratch / index_name(split)
        self._index = pa.ipc.new_file(str(self._index_path), INDEX_SCHEMA)
        self._waiting: list[Sample] = []
        self._tokens = 0
        self._set = (0, "")
        self._shards_of_set = 0
        self._sets: list[int] = []
        self._left_out: Positions = np.empty(0, np.int64)
        self.shards: list[str] = []
        """Names of the shards, in the order of the index' column ``shard``."""
        self.files: list[DataFile] = []
        """What has been written to storage."""

    def begin_set(self, number: int, name: str) -> None:
        """The samples that follow belong to this set."""
        self.flush()
        self._set = (number, name)
        self._shards_of_set = 0

    def add(self, sample: Sample) -> None:
        """Append a sample."""
        self._waiting.append(sample)
        self._tokens += len(sample.ids)
        if self._tokens >= SHARD_TOKENS or len(self._waiting) >= SHARD_ROWS:
            self.flush()

    def close(self) -> None:
        """Write what waits, then the index."""
        self.flush()
        self._index.close()
        if len(self._left_out):
            self._shorten_index()
        self._upload(index_name(self._split), self._index_path)

    def leave_out(self, positions: Sequence[int]) -> tuple[list[int], list[int]]:
        """The index is to go without the samples at these positions of all that were added.

        Returns:
            Length and learned tokens of each.
        """
        self._left_out = np.array(positions, np.int64)
        self._index.close()
        rows = _read(self._index_path).take(self._left_out)
        return rows["length"].to_pylist(), rows["supervised"].to_pylist()

    def written(self) -> Iterator[WrittenShard]:
        """All samples that were added, shard by shard, read back from storage."""
        self.flush()
        path, first = self._scratch / "read.arrow", 0
        for name, number in zip(self.shards, self._sets, strict=True):
            self._store.download(f"{self._uri}/{name}", path)
            ids, starts = shard_ids(path)
            yield WrittenShard(number, first, ids, starts)
            first += len(starts) - 1
            path.unlink()

    def places(self, positions: Collection[int]) -> dict[int, str]:
        """Object and line of the samples at some positions of all that were added."""
        if not positions:
            return {}
        with self._places.open(encoding="utf-8", newline="\n") as lines:
            return {i: line.rstrip("\n") for i, line in enumerate(lines) if i in positions}

    def flush(self) -> None:
        """Write what waits."""
        if not self._waiting:
            return
        name = shard_name(self._split, self._set[1], self._shards_of_set)
        path = self._scratch / "shard.arrow"
        with pa.ipc.new_file(str(path), self._schema) as file:
            file.write_batch(self._batch())
        self._upload(name, path)
        self._index.write_batch(self._index_rows())
        with self._places.open("a", encoding="utf-8", newline="\n") as file:
            file.writelines(s.draft.where.replace("\n", " ") + "\n" for s in self._waiting)
        self.shards.append(name)
        self._sets.append(self._set[0])
        self._shards_of_set += 1
        self._waiting, self._tokens = [], 0

    def _batch(self) -> Any:
        samples = self._waiting
        columns: dict[str, Any] = {
            "input_ids": _lists([s.ids for s in samples]),
            "spans": _lists([np.array(s.spans, np.int32).reshape(-1) for s in samples]),
            "prompt_length": pa.array([s.prompt_length for s in samples], pa.int32()),
            "prompt": [s.draft.prompt for s in samples],
            "completion": [s.draft.completion for s in samples],
            "label": [s.draft.label for s in samples],
        }
        return pa.record_batch(
            [
                pa.array(columns[f.name], f.type)
                if isinstance(columns[f.name], list)
                else columns[f.name]
                for f in self._schema
            ],
            schema=self._schema,
        )

    def _index_rows(self) -> Any:
        count = len(self._waiting)
        columns: dict[str, Any] = {
            "set": np.full(count, self._set[0]),
            "length": [len(s.ids) for s in self._waiting],
            "supervised": [s.supervised for s in self._waiting],
            "shard": np.full(count, len(self.shards)),
            "row": np.arange(count),
        }
        return pa.record_batch(
            [pa.array(columns[f.name], f.type) for f in INDEX_SCHEMA], schema=INDEX_SCHEMA
        )

    def _shorten_index(self) -> None:
        table = _read(self._index_path)
        kept = np.ones(len(table), np.bool_)
        kept[self._left_out] = False
        short = self._index_path.with_suffix(".short")
        with pa.ipc.new_file(str(short), INDEX_SCHEMA) as file:
            file.write_table(table.filter(kept))
        short.replace(self._index_path)

    def _upload(self, name: str, path: Path) -> None:
        info = self._store.upload(path, f"{self._uri}/{name}")
        self.files.append(DataFile(name=name, bytes=info.bytes, sha256=info.sha256))
        path.unlink()


def _read(path: Path) -> Any:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _lists(arrays: Sequence[np.ndarray[Any, np.dtype[np.int32]]]) -> Any:
    """A column of lists, from one array a row."""
    offsets = np.zeros(len(arrays) + 1, np.int32)
    np.cumsum([len(a) for a in arrays], out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays)))
