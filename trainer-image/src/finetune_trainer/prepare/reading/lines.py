"""Streams the text of plain and compressed objects by line; memory holds one line.

Objects are untrusted: a line has a maximum length, and so has the text of a compressed object.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import BinaryIO, Final, cast

import pyarrow as pa

from finetune_trainer.failures import DataError

PACKED: Final = (".gz", ".zst")
"""Name suffixes of compressed objects."""

RECORD_BYTES: Final = 1 << 26
"""Maximum bytes of a record: a missing line break or an unclosed quote must not read the whole
object into memory."""

MOST_RATIO: Final = 200
"""Maximum bytes of text per compressed byte. JSON and CSV reach 3 to 20."""
FREE_BYTES: Final = 1 << 28
"""Bytes of text to which ``MOST_RATIO`` does not apply."""

_BLOCK: Final = 1 << 20
_MARK: Final = b"\xef\xbb\xbf"


def unpack(uri: str, stream: BinaryIO) -> tuple[str, BinaryIO]:
    """Return the object's address without the compression suffix, and its text as a stream.

    Raises (the stream):
        DataError: 'MalformedObject', the compressed data is damaged, or it is a decompression
            bomb.
    """
    if uri.endswith(".gz"):
        packed: BinaryIO = cast(BinaryIO, gzip.GzipFile(fileobj=stream))
    elif uri.endswith(".zst"):
        packed = pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd")
    else:
        return uri, stream
    return uri.rpartition(".")[0], io.BufferedReader(_Unpacked(uri, packed, stream), _BLOCK)


def check_ratio(uri: str, text: int, packed: int) -> None:
    """Refuse a decompression bomb.

    Args:
        text: bytes of decompressed data so far.
        packed: compressed bytes that they came from.

    Raises:
        DataError: 'MalformedObject'.
    """
    if text > max(FREE_BYTES, MOST_RATIO * packed):
        raise DataError(
            "MalformedObject",
            f"{uri}: {packed:,} compressed bytes are more than {text >> 20:,} MiB of text: above"
            f" {FREE_BYTES >> 20} MiB, more than {MOST_RATIO} bytes of text per compressed byte are"
            " refused as a decompression bomb; if the data is right, upload it uncompressed",
        )


class _Unpacked(io.RawIOBase):
    """The decompressed data of a stream.

    Args:
        packed: yields the decompressed data.
        stream: the compressed data.
    """

    def __init__(self, uri: str, packed: BinaryIO, stream: BinaryIO) -> None:
        self._uri, self._packed, self._stream = uri, packed, stream
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
        if self._read > FREE_BYTES:
            check_ratio(self._uri, self._read, self._stream.tell())
        return len(data)


def bounded_lines(stream: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a stream; of a longer line than ``RECORD_BYTES``, the beginning, for which
    ``check_record`` raises."""
    return iter(partial(stream.readline, RECORD_BYTES + 1), b"")


def check_record(uri: str, place: str, size: int) -> None:
    """Refuse a record that is too large.

    Args:
        place: for messages, such as ``line 3``.
        size: its bytes, or some of them.

    Raises:
        DataError: 'MalformedObject'.
    """
    if size > RECORD_BYTES:
        raise DataError(
            "MalformedObject",
            f"{uri}, {place}: longer than {RECORD_BYTES >> 20} MiB, the maximum of a record; is a"
            " line break or a closing quote missing? Divide the record",
        )


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
    """Yield the lines that begin in a byte range of a plain object; the last may end after it. Of a
    longer line than ``RECORD_BYTES``, the beginning (see ``bounded_lines``)."""
    at = start
    if start:
        stream.seek(start - 1)
        at += _skip_line(stream) - 1
    while at < end and (line := stream.readline(RECORD_BYTES + 1)):
        yield line if at else line.removeprefix(_MARK)
        at += len(line)


def _skip_line(stream: BinaryIO) -> int:
    """Skip the rest of a line and return its bytes."""
    skipped = 0
    while part := stream.readline(_BLOCK):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


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
