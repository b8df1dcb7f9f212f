"""Read a model's weights tensor by tensor, from local files or from byte ranges of objects.

    safetensors file    header length, header (name → dtype, shape, byte offsets), tensor bytes

Only the headers are read up front; of a tensor only the requested rows are read, in parallel. So
each rank reads only its own shards, and needs no disk.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.modeling_utils import str_to_torch_dtype

from finetune_trainer.failures import TrainerError, UserError
from finetune_trainer.liveness import progressed
from finetune_trainer.storage.modelfiles import weight_files
from finetune_trainer.storage.objects import (
    ObjectInfo,
    ObjectNotFound,
    ObjectStore,
    PreconditionFailed,
)

PART_BYTES: Final = 16 << 20
"""Largest size of one request."""
PARALLEL: Final = 16
"""Requests in parallel."""
HEAD_BYTES: Final = 256 << 10
"""Size of the first request to an object: most headers are shorter."""
MOST_HEADER_BYTES: Final = 100_000_000
"""Maximum size of a header, as in the safetensors library."""


class Slice(Protocol):
    """A tensor that is read when indexed: safetensors' slice interface, as transformers uses it."""

    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...

    def __getitem__(self, index: Any) -> Tensor: ...


class Weights(Mapping[str, Slice]):
    """Lazily read tensors by name. Thread-safe.

    Libraries read tensors in their own threads and may replace the exceptions of these reads;
    ``reading`` raises the original exception.
    """

    def __init__(self, slices: Mapping[str, Slice], keep: Any = None) -> None:
        """
        Args:
            keep: resources of the slices, referenced for as long as the slices.
        """
        self._slices = dict(slices)
        self._keep = keep
        self._failure: TrainerError | None = None

    @classmethod
    def of_folder(cls, folder: Path) -> Weights:
        """Open the weight files of a model's folder, mapped into memory."""
        return cls.of_files(weight_files(folder))

    @classmethod
    def of_files(cls, paths: Iterable[Path]) -> Weights:
        """Open safetensors files, mapped into memory.

        Raises:
            UserError: 'UnreadableModel' if a file is not a whole safetensors file.
        """
        files: list[Any] = [_opened(path) for path in paths]
        return cls({name: file.get_slice(name) for file in files for name in file.keys()}, files)  # noqa: SIM118

    @classmethod
    def of_objects(cls, store: ObjectStore, objects: Iterable[ObjectInfo]) -> Weights:
        """Open safetensors objects in the listed versions; read their headers.

        Raises:
            UserError: 'ModelChanged' if an object was replaced (also raised by later reads),
                'UnreadableModel' if an object is not a safetensors file.
        """
        pool = ThreadPoolExecutor(PARALLEL, thread_name_prefix="weights")
        made = cls({}, pool)

        def open_object(info: ObjectInfo) -> dict[str, Slice]:
            return dict(_Object(store, info, pool).tensors(made))

        for found in list(pool.map(open_object, objects)):
            made._slices |= found
        return made

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Raise the first failure of any read at the end of the context.

        Raises:
            TrainerError: a storage failure, or 'ModelChanged'.
        """
        try:
            yield
        finally:
            if self._failure is not None:
                raise self._failure

    def failed(self, error: TrainerError) -> None:
        """Record a failure for ``reading``; the first one counts."""
        self._failure = self._failure or error

    def __getitem__(self, name: str) -> Slice:
        return self._slices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._slices)

    def __len__(self) -> int:
        return len(self._slices)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise UserError(
            "UnreadableModel",
            f"{path}: not a whole safetensors file ({error}); write the model again",
        ) from None


def model_changed(info: ObjectInfo) -> UserError:
    """Return the error for an object that differs from the listing."""
    return UserError(
        "ModelChanged",
        f"{info.uri}: the object was replaced or removed while the model was read; make sure that"
        " nothing writes there, then set a new spec.rerunToken",
    )


@dataclass(frozen=True)
class _Object:
    """A safetensors file in object storage."""

    store: ObjectStore
    info: ObjectInfo
    pool: ThreadPoolExecutor

    def tensors(self, of: Weights) -> Iterator[tuple[str, Slice]]:
        """Yield the tensors that the header names."""
        uri, size = self.info.uri, self.info.size
        head = self.request(0, min(HEAD_BYTES, size))
        try:
            (length,) = struct.unpack("<Q", head[:8])
            if length > min(size - 8, MOST_HEADER_BYTES):
                raise ValueError(f"its header would have {length} bytes, the object has {size}")
            if length > len(head) - 8:
                head += self.request(len(head), 8 + length)
            header: dict[str, Any] = json.loads(head[8 : 8 + length])
            header.pop("__metadata__", None)
            places = sorted((*entry["data_offsets"], name) for name, entry in header.items())
            end = 0  # of the tensor before
            for first, last, name in places:
                shape, dtype = header[name]["shape"], header[name]["dtype"]
                tensor = _Tensor(self, of, 8 + length + first, tuple(shape), dtype)
                if not all(type(n) is int and n >= 0 for n in (first, last, *shape)):
                    raise ValueError(f"{name} has shape {shape} at bytes {first} to {last}")
                if first < end or last > size - 8 - length or last - first != tensor.bytes:
                    raise ValueError(
                        f"{name} ({dtype}, shape {shape}) is at bytes {first} to {last} of"
                        f" {size - 8 - length}, and the tensor before it ends at {end}"
                    )
                end = last
                yield name, tensor
        except (ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
            raise UserError(
                "UnreadableModel",
                f"{uri}: not a whole safetensors file ({error}); write the model again",
            ) from error

    def request(self, start: int, stop: int) -> bytes:
        """Return bytes of the object, read by one request."""
        try:
            data = self.store.get_range(self.info.uri, start, stop, etag=self.info.etag)
        except (PreconditionFailed, ObjectNotFound):
            data = b""
        if len(data) != stop - start:
            raise model_changed(self.info)
        return data

    def read(self, start: int, stop: int) -> bytearray:
        """Return bytes of the object, read by parallel requests of ``PART_BYTES``."""
        room = bytearray(stop - start)

        def fill(low: int) -> None:
            high = min(low + PART_BYTES, stop)
            room[low - start : high - start] = self.request(low, high)

        parts = range(start, stop, PART_BYTES)
        if len(parts) == 1:
            fill(start)
        else:
            list(self.pool.map(fill, parts))
        return room


@dataclass(frozen=True)
class _Tensor:
    """A tensor in an object."""

    file: _Object
    of: Weights
    start: int
    """Offset of its first byte in the object."""
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * str_to_torch_dtype[self.dtype].itemsize

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return self.dtype

    def __getitem__(self, index: Any) -> Tensor:
        """Return the indexed part. A slice of the outermost dimension reads only its rows."""
        first, *rest = index if isinstance(index, tuple) else (index,)
        if not self.shape or not isinstance(first, slice):
            return self._rows(0, math.prod(self.shape[:1]))[index]
        low, high, step = first.indices(self.shape[0])
        rows = self._rows(low, max(low, high))
        return rows[(slice(None, None, step), *rest)]

    def _rows(self, low: int, high: int) -> Tensor:
        """Return rows of the outermost dimension; a scalar tensor is returned whole."""
        progressed()
        kind = str_to_torch_dtype[self.dtype]
        shape = (high - low, *self.shape[1:]) if self.shape else ()
        row = math.prod(self.shape[1:]) * kind.itemsize
        if not math.prod(shape):
            return torch.empty(shape, dtype=kind)
        try:
            data = self.file.read(self.start + low * row, self.start + high * row)
        except TrainerError as error:
            self.of.failed(error)
            raise
        return torch.frombuffer(data, dtype=kind).reshape(shape)
