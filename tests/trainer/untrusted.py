"""Hostile data objects: small files that a careless reader expands without bound."""

from __future__ import annotations

import gzip
import io
import json
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

MIB: Final = 1 << 20


class Repeated(io.RawIOBase):
    """A stream of ``count`` copies of a block between a head and a tail: gigabytes from nothing."""

    def __init__(self, block: bytes, count: int, head: bytes = b"", tail: bytes = b"") -> None:
        self._parts = self._all(head, block, count, tail)
        self._rest = b""

    @staticmethod
    def _all(head: bytes, block: bytes, count: int, tail: bytes) -> Iterator[bytes]:
        yield head
        for _ in range(count):
            yield block
        yield tail

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._rest:
            part = next(self._parts, None)
            if part is None:
                return 0
            self._rest = part
        data, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)


def _endless(block: bytes, head: bytes = b"") -> Callable[[], BinaryIO]:
    """A GiB of a block."""
    block *= MIB // len(block)
    return lambda: io.BufferedReader(Repeated(block, 1024, head), MIB)  # type: ignore[type-var]


_LINES: Final = (b'{"a": "' + b"x" * 1000 + b'"}\n') * 8000
"""8 MB of records."""


def _gzip_bomb() -> bytes:
    return gzip.compress(_LINES) * 32


def _zstd_bomb() -> bytes:
    return bytes(pa.compress(_LINES * 32, "zstd", asbytes=True))


def _parquet(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def _dictionary_bomb() -> bytes:
    """Two texts of 1 MiB, and 5,000 rows that refer to them: 5 GB."""
    texts = ["x" * MIB, "y" * MIB]
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1] * 2500, pa.int32()), pa.array(texts))
    return _parquet(
        pa.table({"text": column}),
        compression="zstd",
        dictionary_pagesize_limit=4 * MIB,
        store_schema=False,
    )


def _level_bomb() -> bytes:
    """One row with a list of 30 million zeros."""
    many = pa.array(np.zeros(30 * MIB, np.int64))
    column = pa.ListArray.from_arrays(pa.array([0, len(many)], pa.int32()), many)
    return _parquet(pa.table({"text": column}), compression="zstd")


def _page_bomb() -> bytes:
    """A page of 96 MiB of one letter; the footer says so."""
    text = pa.array(["x" * (96 * MIB)])
    return _parquet(pa.table({"text": text}), compression="zstd", use_dictionary=False)


def _lying_footer() -> bytes:
    """A file whose last bytes declare a footer of 4 GiB."""
    return b"PAR1" + b"x" * 100 + struct.pack("<I", 0xFFFFFFFF) + b"PAR1"


def _deep(opening: str, closing: str) -> bytes:
    return f'{{"a": {opening * 100_000}1{closing * 100_000}}}\n'.encode()


def _of(make: Callable[[], bytes]) -> Callable[[], BinaryIO]:
    return lambda: io.BytesIO(make())


ATTACKS: Final[dict[str, tuple[str, Callable[[], BinaryIO], str]]] = {
    "line without end": ("a.jsonl", _endless(b"x", b'{"a": 1}\n{"a": "'), "line 2: longer"),
    "line of .json without end": ("a.json", _endless(b"x", b'{"a": "'), "a.json, line 1: longer"),
    "item without end": ("a.json", _endless(b"x", b'[{"a": 1}, {"a": "'), "a.json, record 2: it"),
    "row of endless fields": ("a.csv", _endless(b"x,", b"a,b\n1,2\n"), "a.csv, row 2: longer than"),
    "row of endless lines": ("a.csv", _endless(b"x" * 63 + b"\n", b'a,b\n1,2\n"'), "row 2: longer"),
    "header without end": ("a.csv", _endless(b"x" * 63 + b","), "a.csv, the header: longer"),
    "gzip bomb": ("a.jsonl.gz", _of(_gzip_bomb), "a.jsonl.gz: 82,"),
    "zstd bomb": ("a.jsonl.zst", _of(_zstd_bomb), "a.jsonl.zst: "),
    "zstd bomb of one line": ("a.csv.zst", _of(lambda: _zstd(b"x" * 96 * MIB)), "header: longer"),
    "deep arrays": ("a.jsonl", _of(lambda: _deep("[", "]")), "line 1: nested more than 100 levels"),
    "deep objects": ("a.jsonl", _of(lambda: _deep('{"a": ', "}")), "line 1: nested more than 100"),
    "deep item": ("a.json", _of(lambda: b"[" * 10**6), "record 1: the object ends"),
    "huge number": ("a.jsonl", _of(lambda: b'{"a": ' + b"9" * 10**6 + b"}"), "line 1, column 7"),
    "Parquet dictionary bomb": ("a.parquet", _of(_dictionary_bomb), "after row 0 needs more"),
    "Parquet list bomb": ("a.parquet", _of(_level_bomb), "after row 0 needs more"),
    "Parquet page bomb": ("a.parquet", _of(_page_bomb), "decompression bomb"),
    "Parquet footer that lies": ("a.parquet", _of(_lying_footer), "after row 0"),
}  # fmt: skip
"""By name: the object's name, its content, and words of the failure (its place and cause)."""


def lower_limits(_: object) -> None:
    """Begin a process of a pool, with a low limit of time for templates."""
    from finetune_trainer.prepare.rendering import limits

    limits.SECONDS = 0.2


def compare_for_ever(_: object) -> bool:
    """Compare two lists that share their items: 2 ** 60 comparisons in one operation."""
    from finetune_trainer.prepare.rendering.limits import limited_work

    one: list[Any] = [1]
    other: list[Any] = [1]
    for _ in range(60):
        one, other = [one, one], [other, other]
    with limited_work():
        return one == other


def _zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, "zstd", asbytes=True))


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def read_all(attack: str) -> dict[str, Any]:
    """Read the object of an attack to the failure; return it with the memory that reading took."""
    from finetune_trainer.failures import DataError
    from finetune_trainer.prepare.reading.records import read_records

    name, opened, _ = ATTACKS[attack]
    stream = opened()
    pa.default_memory_pool().release_unused()  # of making the object
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, began = _memory("VmRSS"), time.process_time()
    found: dict[str, Any] = {"reason": None, "message": "it was read"}
    try:
        for _ in read_records(f"s3://b/{name}", stream):
            pass
    except DataError as error:
        found = {"reason": error.reason, "message": error.message}
    return found | {"seconds": time.process_time() - began, "bytes": _memory("VmHWM") - before}


def main() -> None:
    """Print the result of every attack as JSON, with limits that are reached sooner."""
    from finetune_trainer.prepare.reading import lines

    lines.RECORD_BYTES, lines.FREE_BYTES = 8 * MIB, 32 * MIB
    from finetune_trainer.prepare.reading import parquetrows

    parquetrows.DECODER_BYTES = 64 * MIB
    print(json.dumps({attack: read_all(attack) for attack in ATTACKS}))


if __name__ == "__main__":
    main()
