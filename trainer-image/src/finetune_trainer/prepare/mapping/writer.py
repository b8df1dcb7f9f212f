"""Writes the mapped samples of an input split to shards, and their statistics to a file. Memory
holds one shard per side."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from finetune_api.sources import Format
from finetune_trainer.failures import DataError
from finetune_trainer.prepare.mapping.batch import MappedBatch
from finetune_trainer.prepare.mapping.statistics import (
    SCHEMA,
    Fault,
    Preview,
    ShardFile,
    SplitSummary,
)
from finetune_trainer.prepare.reading.faults import Faults
from finetune_trainer.prepared.dataset import shard_name
from finetune_trainer.prepared.split import SIDES, Side
from finetune_trainer.storage.objects import ObjectStore

SHARD_TOKENS: Final = 4 << 20
"""Tokens at which a shard is closed: 16 MiB, one part of a multipart upload."""

SHARD_ROWS: Final = 1 << 16
"""Samples at which a shard is closed, however short they are."""

OFFERED: Final = 8
"""Previews of each side that a split offers to the report. Some samples may be duplicates."""


class SplitWriter:
    """Writes one input split.

    Args:
        store: storage of the shards.
        uri: prefix of the prepared data.
        scratch: local folder for temporary files.
        name: name of the set.
        number: number of the split.
    """

    def __init__(self, store: ObjectStore, uri: str, scratch: Path, name: str, number: int) -> None:
        self._shards = {
            side: ShardWriter(store, uri, scratch, side, name, number) for side in SIDES
        }
        self._path = scratch / "statistics.arrow"
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        self._statistics = pa.ipc.new_file(str(self._path), SCHEMA, options=options)
        self._rows = 0
        self._counts: Counter[str] = Counter()
        self._languages: Counter[str] = Counter()
        self._faults = Faults("Drop")
        self._previews: dict[Side, list[Preview]] = {}

    def add(self, mapped: MappedBatch) -> None:
        """Append a batch. Batches are added in the order of the data."""
        for side, offered in mapped.previews.items():
            kept = self._previews.setdefault(side, [])
            kept += [
                Preview(sample=self._rows + p.sample, shown=p.shown)
                for p in offered[: OFFERED - len(kept)]
            ]
        for side, samples in mapped.samples.items():
            self._shards[side].add(samples)
        if mapped.statistics.num_rows:
            self._statistics.write_batch(mapped.statistics)
            self._rows += mapped.statistics.num_rows
        self._counts.update(mapped.counts)
        self._languages.update(mapped.languages)
        self._faults.merge(mapped.reasons, [DataError(f.reason, f.message) for f in mapped.faults])

    def wanted(self) -> dict[Side, int]:
        """Previews of each side still accepted: an upper bound, as batches are in flight."""
        return {side: OFFERED - len(self._previews.get(side, ())) for side in SIDES}

    def finish(self, form: Format | None, compared: int | None) -> tuple[SplitSummary, Path]:
        """Write buffered samples; return the summary and the path of the statistics."""
        for writer in self._shards.values():
            writer.flush()
        self._statistics.close()
        summary = SplitSummary(
            format=form,
            compared=compared,
            reasons=dict(self._faults.reasons),
            faults=[Fault(reason=e.reason, message=e.message) for e in self._faults.first],
            languages=dict(self._languages),
            previews=self._previews,
            shards={side: writer.files for side, writer in self._shards.items()},
            **self._counts,
        )
        return summary, self._path


class ShardWriter:
    """Writes the samples of one side of an input split.

    Args:
        store: storage of the files.
        uri: prefix of the prepared data.
        scratch: local folder for the file being written.
        side: side of the split.
        name: name of the set.
        number: number of the input split.
    """

    def __init__(
        self, store: ObjectStore, uri: str, scratch: Path, side: Side, name: str, number: int
    ) -> None:
        self._store, self._uri, self._scratch = store, uri, scratch
        self._side, self._name, self._number = side, name, number
        self._waiting: list[Any] = []
        self._rows = self._tokens = 0
        self.files: list[ShardFile] = []
        """Files written to storage."""

    def add(self, samples: Any) -> None:
        """Append a record batch of samples."""
        self._waiting.append(samples)
        self._rows += samples.num_rows
        ids = samples.column("input_ids")
        self._tokens += len(ids.flatten())
        if self._tokens >= SHARD_TOKENS or self._rows >= SHARD_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write the buffered samples."""
        if not self._waiting:
            return
        name = shard_name(self._side, self._name, self._number, len(self.files))
        path = self._scratch / "shard.arrow"
        batch = pa.Table.from_batches(self._waiting).combine_chunks().to_batches()[0]
        with pa.ipc.new_file(str(path), batch.schema) as file:
            file.write_batch(batch)
        info = self._store.upload(path, f"{self._uri}/{name}")
        path.unlink()
        self.files.append(
            ShardFile(name=name, bytes=info.bytes, sha256=info.sha256, samples=batch.num_rows)
        )
        self._waiting = []
        self._rows = self._tokens = 0
