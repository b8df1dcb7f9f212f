"""Writes the samples of a part to shards, and shards to storage as they fill: memory holds one
shard a side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from finetune_trainer.prepare.tokenizing.tokens import Ids, Sample
from finetune_trainer.prepared.manifest import DataFile
from finetune_trainer.prepared.shards import REFERENCE_SCHEMA, TOKEN_SCHEMA, shard_name
from finetune_trainer.prepared.split import Side
from finetune_trainer.storage.objects import ObjectStore

SHARD_TOKENS: Final = 4 << 20
"""Tokens at which a shard is closed: 16 MiB, one multipart upload's part."""

SHARD_ROWS: Final = 1 << 16
"""Samples at which a shard is closed, however short they are."""


class ShardWriter:
    """Writes the samples that a part has for one side.

    Args:
        store: where the files go.
        uri: prefix of the prepared data.
        scratch: folder for the file that is being written.
        side: side of the split.
        name: name of the set.
        part: number of the part.
    """

    def __init__(
        self, store: ObjectStore, uri: str, scratch: Path, side: Side, name: str, part: int
    ) -> None:
        self._store, self._uri, self._scratch = store, uri, scratch
        self._side, self._name, self._part = side, name, part
        self._schema = TOKEN_SCHEMA if side == "train" else REFERENCE_SCHEMA
        self._columns: dict[str, list[Any]] = {name: [] for name in self._schema.names}
        self._tokens = 0
        self.files: list[DataFile] = []
        """What has been written to storage."""

    def add(self, sample: Sample) -> tuple[int, int]:
        """Append a sample; returns the number of its shard and its row there."""
        place = len(self.files), len(self._columns["input_ids"])
        values = {
            "input_ids": sample.ids,
            "spans": np.array(sample.spans, np.int32).reshape(-1),
            "prompt_length": sample.prompt_length,
            "prompt": sample.draft.prompt,
            "completion": sample.draft.completion,
            "label": sample.draft.label,
        }
        for name, column in self._columns.items():
            column.append(values[name])
        self._tokens += len(sample.ids)
        if self._tokens >= SHARD_TOKENS or place[1] + 1 >= SHARD_ROWS:
            self.flush()
        return place

    def flush(self) -> None:
        """Write what waits."""
        if not self._columns["input_ids"]:
            return
        name = shard_name(self._side, self._name, self._part, len(self.files))
        path = self._scratch / "shard.arrow"
        with pa.ipc.new_file(str(path), self._schema) as file:
            file.write_batch(self._batch())
        info = self._store.upload(path, f"{self._uri}/{name}")
        path.unlink()
        self.files.append(DataFile(name=name, bytes=info.bytes, sha256=info.sha256))
        self._tokens = 0

    def _batch(self) -> Any:
        arrays = []
        for field in self._schema:
            values = self._columns[field.name]
            arrays.append(
                _lists(values) if pa.types.is_list(field.type) else pa.array(values, field.type)
            )
            values.clear()
        return pa.record_batch(arrays, schema=self._schema)


def _lists(arrays: Sequence[Ids]) -> Any:
    """A column of lists, from one array a row."""
    offsets = np.zeros(len(arrays) + 1, np.int32)
    np.cumsum([len(a) for a in arrays], out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays)))
