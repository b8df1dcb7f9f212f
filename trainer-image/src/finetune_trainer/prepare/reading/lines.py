"""Streams the text of plain and compressed objects by line; memory holds one line."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO, Final, cast

import pyarrow as pa

from finetune_trainer.failures import DataError

PACKED: Final = (".gz", ".zst")
"""Name suffixes of compressed objects."""

_BLOCK: Final = 1 << 20
_MARK: Final = b"\xef\xbb\xbf"


def unpack(uri: str, stream: BinaryIO) -> tuple[str, BinaryIO]:
    """Return the object's address without the compression suffix, and its text as a stream.

    Raises (the stream):
        DataError: 'MalformedObject', the compressed data is damaged.
    """
    if uri.endswith(".gz"):
        packed: BinaryIO = cast(BinaryIO, gzip.GzipFile(fileobj=stream))
    elif uri.endswith(".zst"):
        packed = pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd")
    else:
        return uri, stream
    return uri.rpartition(".")[0], io.BufferedReader(_Unpacked(uri, packed), _BLOCK)


class _Unpacked(io.RawIOBase):
    """The decompressed data of a stream."""

    def __init__(self, uri: str, packed: BinaryIO) -> None:
        self._uri, self._packed = uri, packed
        self._read = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            data = self._packed.read(len(buffer))
        except (EOFError, zlib.error, OSError) as error:
            raise DataError(
                "MalformedObject",
                f"{self._uri}: the compressed data is damaged after byte {self._read} of its text"
                f" ({error}); upload it again",
            ) from None
        buffer[: len(data)] = data
        self._read += len(data)
        return len(data)


def without_mark(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines without the byte order mark that some programs write."""
    for number, line in enumerate(lines):
        yield line if number else line.removeprefix(_MARK)


def beginning(stream: BinaryIO) -> tuple[int, bytes]:
    """Return the number of leading empty lines of a stream, and the first other line, without a
    byte order mark; of a long line, the first ``_BLOCK`` bytes."""
    empty = 0
    line = stream.readline(_BLOCK).removeprefix(_MARK)
    while line.isspace():
        empty += line.endswith(b"\n")
        line = stream.readline(_BLOCK)
    return empty, line


def is_plain(uri: str) -> bool:
    """Whether an object is uncompressed JSON Lines, readable from any line, by its name. An object
    named .json may be an array."""
    return uri.endswith(".jsonl")


def lines_between(stream: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    """Yield the lines that begin in a byte range of a plain object; the last may end after it."""
    at = start
    if start:
        stream.seek(start - 1)
        at += len(stream.readline()) - 1
    while at < end and (line := stream.readline()):
        yield line if at else line.removeprefix(_MARK)
        at += len(line)


def count_lines(stream: BinaryIO, start: int, end: int) -> int:
    """Return the number of lines that ``lines_between`` yields."""
    at = max(0, start - 1)
    lines = 1 if start == 0 < end else 0
    stream.seek(at)
    while at < end - 1 and (block := stream.read(min(_BLOCK, end - 1 - at))):
        lines += block.count(b"\n")
        at += len(block)
    return lines


def decoded(uri: str, place: str, data: bytes) -> str:
    """Decode a line or an item.

    Args:
        place: for messages, such as ``line 3``.

    Raises:
        DataError: 'MalformedRecord', with place and byte.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            "MalformedRecord",
            f"{uri}, {place}, byte {error.start + 1}: not UTF-8 text"
            f" ({data[error.start : error.start + 8]!r}); convert the file to UTF-8",
        ) from None
