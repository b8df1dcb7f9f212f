"""Read one object as a file: from any position, across broken connections, in a single version.

Every reopened connection requests the version of the first one (If-Match on its ETag), so an object
that is replaced during the read raises an error instead of returning a mixture of versions.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol, cast

from finetune_trainer.failures import StorageUnavailable

BUFFER_BYTES = 1 << 20
MAX_REOPENS = 5
"""Consecutive connections that may break without delivering a byte."""


class Body(Protocol):
    """The body of a response."""

    def read(self, amount: int) -> bytes: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Opened:
    """One connection: the bytes from the requested position on, and the object's size and ETag."""

    body: Body
    size: int
    """Size of the whole object in bytes."""
    etag: str


Opener = Callable[[int, str | None], Opened]
"""``open(position, etag)``; raises DataError 'ObjectChanged' if the ETag has changed."""


class ObjectStream(io.RawIOBase):
    """A seekable raw stream over an ``Opener``; use ``open_stream`` for a buffered one."""

    def __init__(self, opener: Opener, etag: str | None) -> None:
        self._opener = opener
        self._etag = etag
        self._position = 0
        self._size: int | None = None
        self._body: Body | None = None
        self._open()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size or 0}[whence]
        if base + offset != self._position:
            self._drop()
            self._position = base + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Read from the current position into ``buffer``; return the byte count, 0 at the end.

        Raises:
            StorageUnavailable: after ``MAX_REOPENS`` reopened connections without a byte.
        """
        for reopened in range(MAX_REOPENS + 1):
            if self._size is not None and self._position >= self._size:
                return 0
            body = self._body or self._open()
            try:
                data = body.read(len(buffer))
            except StorageUnavailable:
                self._drop()
                if reopened == MAX_REOPENS:
                    raise
                continue
            if data:
                buffer[: len(data)] = data
                self._position += len(data)
                return len(data)
            self._drop()  # ended before the object did: request the rest
        raise StorageUnavailable(
            "StorageUnreachable",
            f"the connection ended {MAX_REOPENS} times at byte {self._position} of {self._size}",
        )

    def close(self) -> None:
        self._drop()
        super().close()

    def _open(self) -> Body:
        opened = self._opener(self._position, self._etag)
        self._etag, self._size, self._body = opened.etag, opened.size, opened.body
        return opened.body

    def _drop(self) -> None:
        if self._body is not None:
            self._body.close()
            self._body = None


def open_stream(opener: Opener, etag: str | None) -> BinaryIO:
    """Return a buffered, seekable file of the object."""
    return cast(BinaryIO, io.BufferedReader(ObjectStream(opener, etag), BUFFER_BYTES))


class MemoryFile(io.RawIOBase):
    """A file over memory whose reads are views: a request body that is sent without a copy.

    ``read`` returns memoryviews, which sockets and hashes accept like bytes.
    """

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: len(self._data)}
        self._position = origin[whence] + offset
        return self._position

    def read(self, size: int | None = -1) -> Any:
        """Return the next bytes as a view of the memory."""
        stop = len(self._data) if size is None or size < 0 else self._position + size
        found = self._data[self._position : stop]
        self._position += len(found)
        return found

    def __len__(self) -> int:
        return len(self._data)
