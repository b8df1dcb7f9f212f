"""Lines of text objects, plain or compressed, as they stream: memory holds one line."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO, Final, cast

import pyarrow as pa

from finetune_trainer.failures import DataError

PACKED: Final = (".gz", ".zst")
"""Endings of names of compressed objects."""

_BLOCK: Final = 1 << 20
_MARK: Final = b"\xef\xbb\xbf"


def open_lines(uri: str, stream: BinaryIO) -> tuple[str, Iterator[bytes]]:
    """The object's address without the ending of its compression, and its lines.

    Raises (the iterator):
        DataError: 'MalformedObject' where the compressed data is damaged.
    """
    if uri.endswith(".gz"):
        unpacked = cast(BinaryIO, gzip.GzipFile(fileobj=stream))
    elif uri.endswith(".zst"):
        packed = pa.PythonFile(stream, mode="r")
        unpacked = io.BufferedReader(pa.CompressedInputStream(packed, "zstd"))
    else:
        return uri, _without_mark(stream)
    return uri.rpartition(".")[0], _without_mark(_unpacked(uri, unpacked))


def _unpacked(uri: str, plain: BinaryIO) -> Iterator[bytes]:
    lines = 0
    try:
        with plain:
            for line in plain:
                yield line
                lines += 1
    except (EOFError, zlib.error, OSError) as error:
        raise DataError(
            "MalformedObject",
            f"{uri}: the compressed data is damaged after line {lines} ({error}); upload it again",
        ) from None


def _without_mark(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The lines without the byte order mark that some programs write before the first."""
    for number, line in enumerate(lines):
        yield line if number else line.removeprefix(_MARK)


def is_plain(uri: str) -> bool:
    """Whether an object is JSON Lines that can be read from any line on."""
    return uri.endswith((".jsonl", ".json"))


def lines_between(stream: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    """The lines that begin in a range of a plain object's bytes; the last may end behind it."""
    at = start
    if start:
        stream.seek(start - 1)
        at += len(stream.readline()) - 1
    while at < end and (line := stream.readline()):
        yield line if at else line.removeprefix(_MARK)
        at += len(line)


def count_lines(stream: BinaryIO, start: int, end: int) -> int:
    """How many lines ``lines_between`` yields."""
    at = max(0, start - 1)
    lines = 1 if start == 0 < end else 0
    stream.seek(at)
    while at < end - 1 and (block := stream.read(min(_BLOCK, end - 1 - at))):
        lines += block.count(b"\n")
        at += len(block)
    return lines


def decoded(uri: str, number: int, line: bytes) -> str:
    """The text of a line.

    Raises:
        DataError: 'MalformedRecord', naming line and byte.
    """
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            "MalformedRecord",
            f"{uri}, line {number}, byte {error.start + 1}: not UTF-8 text"
            f" ({line[error.start : error.start + 8]!r}); convert the file to UTF-8",
        ) from None
