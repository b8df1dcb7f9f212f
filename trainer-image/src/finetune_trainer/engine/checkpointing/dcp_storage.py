"""torch's distributed checkpoint over object storage: each process streams its tensors into one
object, and reads the byte ranges that it needs from any object.

    shard-00000    raw bytes of the tensors, in the layout of the staging buffer (``staging``)
    .metadata      torch's Metadata, with the object and byte offset of each tensor

No temporary files are used, and uploads send directly from the staging buffer. A reading process
holds a few parts of an object in memory, and the tensor that these parts fill.
"""

from __future__ import annotations

import io
import math
import pickle
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import Any, Final, TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from finetune_trainer.engine.checkpointing.staging import StagedState
from finetune_trainer.storage.checkpoint_files import (
    PartSums,
    read_parts,
    stream_file,
    write_file,
)
from finetune_trainer.storage.local_copies import LocalCopies, Pieces
from finetune_trainer.storage.objects import FileInfo, ObjectStore
from finetune_trainer.storage.run_head import Checkpoint, CorruptCheckpoint

METADATA: Final = ".metadata"
METADATA_MODULE: Final = Metadata.__module__
METADATA_CLASSES: Final = (
    "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
    "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
)  # fmt: skip
T = TypeVar("T")


@dataclass(frozen=True)
class ByteRange:
    """Position of an item's bytes."""

    file: str
    start: int
    """Offset of the first byte in ``file``."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    def span(self, first: int, rows: int | None) -> tuple[int, int]:
        """Byte range [start, stop) of ``rows`` rows of the outermost dimension from row ``first``
        on (None: all rows)."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        count = math.prod(self.shape[:1]) if rows is None else rows
        return self.start + first * row, self.start + (first + count) * row


class CheckpointWriter(StorageWriter):
    """Write the files of one checkpoint; each process has its own writer."""

    def __init__(self, store: ObjectStore, uri: str) -> None:
        self._store, self._uri = store, uri
        self.files: dict[str, FileInfo] = {}
        """Files that this process has written, by name below the checkpoint's URI."""
        self.content: dict[str, Pieces] = {}
        """Their bytes; those of a shard are views of the staged state."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=f"shard-{i:05}") for i, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        assert isinstance(planner, StagedState), "the planner must be the staged state"
        name: str = plan.storage_data
        results: list[WriteResult] = []
        for item in plan.items:
            staged = planner.items[item.index]
            byte_range = ByteRange(name, staged.start, staged.shape, staged.dtype)
            start, stop = byte_range.span(0, None)
            results.append(WriteResult(item.index, stop - start, byte_range))
        if plan.items:
            uri = f"{self._uri}/{name}"
            sums = stream_file(self._store, uri, planner.pieces, planner.size)
            self.files[name], self.content[name] = sums.info, planner.pieces
            results.append(WriteResult(MetadataIndex(name), sums.size, sums))
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        metadata.storage_data = {r.index: r.storage_data for part in results for r in part}
        self.write(METADATA, pickle.dumps(metadata))

    def write(self, name: str, data: bytes) -> None:
        """Write a small file next to the shards."""
        self.files[name] = write_file(self._store, f"{self._uri}/{name}", data)
        self.content[name] = [data]


class CheckpointReader(StorageReader):
    """Read a checkpoint at any world size.

    Args:
        metadata: content of the checkpoint's file ``METADATA``, already verified: torch would hide
            the cause of an error in this file.
        copies: this node's copies of checkpoints, read in place of storage.

    Raises (from torch's ``load``):
        CorruptCheckpoint: if a file is missing or differs from the committed one.
    """

    def __init__(
        self, store: ObjectStore, checkpoint: Checkpoint, metadata: bytes,
        copies: LocalCopies | None = None,
    ) -> None:  # fmt: skip
        self._store, self._commit, self._metadata = store, checkpoint, metadata
        self._copies = copies
        self._data: dict[MetadataIndex, Any] = {}

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return _unpickled(self._metadata, self._commit.uri)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        self._data = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        wanted = [_Wanted(item, self._data[item.storage_index]) for item in plan.items]
        for item in wanted:
            if item.start == item.stop:  # empty: no part will complete it
                item.deliver(planner)
        waiting = [item for item in wanted if item.start < item.stop]
        waiting.sort(key=lambda w: (w.file, w.start), reverse=True)  # pop() takes the next item
        sums: dict[str, PartSums] = {w.file: self._data[MetadataIndex(w.file)] for w in waiting}
        parts = {
            (w.file, number) for w in waiting for number in sums[w.file].parts(w.start, w.stop)
        }
        under_way: list[_Wanted] = []
        found = read_parts(self._store, self._commit, sums, sorted(parts), self._copies)
        for name, number, data in found:
            start = number * sums[name].part_bytes
            stop = start + len(data)
            while waiting and (waiting[-1].file, waiting[-1].start) < (name, stop):
                under_way.append(waiting.pop())
            for item in under_way:
                item.take(start, data)
                if item.stop <= stop:
                    item.deliver(planner)
            under_way = [item for item in under_way if item.stop > stop]
        return _done(None)


class _Unpickler(pickle.Unpickler):
    """Loads metadata and nothing else: whoever may write to the workspace could otherwise run code
    in the process group."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        known = (module, name) in _KNOWN
        if not known and not (module == "torch" and isinstance(getattr(torch, name), torch.dtype)):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not metadata")
        return super().find_class(module, name)


def _member(kind: Any, name: str) -> Any:
    """A member of an enumeration; Python 3.11.0 to 3.11.3 pickle it as ``getattr(kind, name)``."""
    if not (isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__):
        raise pickle.UnpicklingError(f"it names {kind!r}.{name}, which is not metadata")
    return kind[name]


_KNOWN: Final = {
    *((METADATA_MODULE, name) for name in METADATA_CLASSES),
    *((kind.__module__, kind.__qualname__) for kind in (ByteRange, PartSums, FileInfo)),
    *(("torch", "Size"), ("torch.serialization", "_get_layout")),
}
"""Classes and functions that ``pickle.dumps`` names in metadata."""


def _unpickled(data: bytes, uri: str) -> Metadata:
    try:
        found: Metadata = _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # damaged pickles raise almost anything
        raise CorruptCheckpoint(f"{uri}/{METADATA}", str(error)) from None
    return found


class LoadPlannerOfValues(DefaultLoadPlanner):
    """torch's load planner, which reads values that are not tensors (learning rates) without
    running what a pickle names."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        loaded = torch.load(value, weights_only=True)
        safe = io.BytesIO()
        torch.save(loaded, safe)
        safe.seek(0)
        super().load_bytes(read_item, safe)


class _Wanted:
    """Rows of a tensor, or bytes of a pickled object, that are being read. Whole rows of the
    outermost dimension are read even if only part of each is needed."""

    def __init__(self, item: ReadItem, byte_range: ByteRange) -> None:
        self._item, self._byte_range = item, byte_range
        some = item.type is LoadItemType.TENSOR and len(byte_range.shape) > 0
        first = item.storage_offsets[0] if some else 0
        self._rows = item.lengths[0] if some else None
        self.file = byte_range.file
        self.start, self.stop = byte_range.span(first, self._rows)

    @cached_property
    def _values(self) -> Tensor:
        shape = (
            self._byte_range.shape
            if self._rows is None
            else (self._rows, *self._byte_range.shape[1:])
        )
        return torch.empty(shape, dtype=self._byte_range.dtype)

    def take(self, start: int, data: bytes) -> None:
        """Copy the overlap with ``data``, the file's bytes from offset ``start`` on."""
        low, high = max(start, self.start), min(start + len(data), self.stop)
        mine = _bytes_of(self._values)
        mine[low - self.start : high - self.start] = memoryview(data)[low - start : high - start]

    def deliver(self, planner: LoadPlanner) -> None:
        """Hand the complete item to the planner."""
        item, values = self._item, self._values
        if item.type is LoadItemType.BYTE_IO:
            planner.load_bytes(item, io.BytesIO(_bytes_of(values)))
            return
        for dimension in range(1, values.dim()):
            first, count = item.storage_offsets[dimension], item.lengths[dimension]
            values = values.narrow(dimension, first, count)
        target = planner.resolve_tensor(item).detach()
        target.copy_(values)
        planner.commit_tensor(item, target)


def _bytes_of(values: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    raw: Any = values.reshape(-1).view(torch.uint8).numpy()
    return memoryview(raw)


def _done(value: T) -> Future[T]:
    done: Future[T] = Future()
    done.set_result(value)
    return done
