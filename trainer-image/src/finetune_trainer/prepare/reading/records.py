"""Streams records from objects: JSON and CSV (plain, gzip, zstd) and Parquet.

    stream ─raw_records→ RawRecord (text, or a row's fields) ─parse→ Record

The first step is cheap and sequential; any process can run the second. Memory does not grow with
the object. Every record, and every error about one, names the object and the line (or row, or
number in an array).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, BinaryIO, Final, NamedTuple

from finetune_trainer.failures import DataError, UserError
from finetune_trainer.personal import excerpt
from finetune_trainer.prepare.reading.arrays import array_items
from finetune_trainer.prepare.reading.csvrows import csv_rows
from finetune_trainer.prepare.reading.faults import Complain, refuse
from finetune_trainer.prepare.reading.lines import (
    PACKED,
    RECORD_BYTES,
    beginning,
    bounded_lines,
    check_record,
    decoded,
    unpack,
    without_mark,
)
from finetune_trainer.prepare.reading.parquetrows import parquet_rows

Fields = dict[str, Any]

SUFFIXES: Final = (
    *(kind + ending for kind in (".jsonl", ".json", ".csv") for ending in ("", *PACKED)),
    ".parquet",
)
"""Name suffixes of supported objects."""

MOST_DEPTH: Final = 100
"""Maximum depth of a record. Deeper, Python's own functions (json, repr) end in RecursionError."""

_HALF: Final = re.compile(r"\\u[dD][89a-fA-F]")
"""A surrogate, as JSON escapes it; a pair is one character."""

_LONG: Final = re.compile(r"\d{4301}")
"""More digits than Python's int() accepts."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record and its position."""

    fields: Fields
    uri: str
    place: str
    """``line 3``, ``row 3``, or ``record 3`` of an array, counted from 1."""

    @property
    def where(self) -> str:
        """``s3://bucket/key, line 3``."""
        return f"{self.uri}, {self.place}"


class RawRecord(NamedTuple):
    """One record before it is parsed."""

    uri: str
    unit: str
    """Unit of ``number``: ``line``, ``row``, or ``record`` of an array."""
    number: int
    """From 1."""
    content: bytes | Fields | DataError
    """JSON text, the fields of a row, or the error of an unreadable row."""

    @property
    def place(self) -> str:
        """``line 3``, ``row 3``, or ``record 3`` of an array."""
        return f"{self.unit} {self.number}"

    @property
    def where(self) -> str:
        """``s3://bucket/key, line 3``."""
        return f"{self.uri}, {self.place}"


def readable(uri: str) -> bool:
    """Whether the object's name ends in one of ``SUFFIXES``."""
    return uri.endswith(SUFFIXES)


def read_records(uri: str, stream: BinaryIO, complain: Complain = refuse) -> Iterator[Record]:
    """Yield all records of one object, in order.

    Args:
        uri, stream: see ``raw_records``.
        complain: called with errors of ``parse``.

    Raises:
        UserError, DataError: from ``raw_records`` and ``complain``.
    """
    for raw in raw_records(uri, stream):
        try:
            record = parse(raw)
        except DataError as error:
            complain(error)
        else:
            yield record


def raw_records(uri: str, stream: BinaryIO) -> Iterator[RawRecord]:
    """Yield all records of one object, in order, unparsed. Empty lines are skipped.

    Args:
        uri: address of the object. Its suffix selects the reader; for .json, the first character
            distinguishes an array from JSON Lines.
        stream: the object from its beginning (seekable, for Parquet).

    Raises:
        UserError: 'UnknownObjectType', the suffix is unknown.
        DataError: 'MalformedObject', the object as a whole cannot be read.
    """
    if not readable(uri):
        raise UserError(
            "UnknownObjectType",
            f"{uri}: the name must end in one of {', '.join(SUFFIXES)}; rename the object, or give"
            " a pattern that leaves it out",
        )
    if uri.endswith(".parquet"):
        for row, fields in parquet_rows(uri, stream):
            yield RawRecord(uri, "row", row, fields)
        return
    name, text = unpack(uri, stream)
    if name.endswith(".csv"):
        for row, fields in csv_rows(uri, without_mark(bounded_lines(text))):
            yield RawRecord(uri, "row", row, fields)
    elif name.endswith(".json"):
        yield from _raw_json(uri, text)
    else:
        yield from raw_lines(uri, without_mark(bounded_lines(text)))


def raw_lines(uri: str, lines: Iterable[bytes], before: int = 0) -> Iterator[RawRecord]:
    """Yield the records of JSON lines.

    Args:
        before: number of lines of the object before these.

    Raises:
        DataError: 'MalformedObject', a line is too long.
    """
    for number, line in enumerate(lines, before + 1):
        if len(line) > RECORD_BYTES:
            check_record(uri, f"line {number}", len(line))
        if line and not line.isspace():
            yield RawRecord(uri, "line", number, line)


def _raw_json(uri: str, text: BinaryIO) -> Iterator[RawRecord]:
    """Yield the records of one array or of JSON Lines, depending on the first character."""
    empty, line = beginning(text)
    opening, bracket, behind = line.partition(b"[")
    if bracket and not opening.strip():
        for number, item in enumerate(array_items(uri, text, behind), 1):
            yield RawRecord(uri, "record", number, item)
        return
    rest = b"" if line.endswith(b"\n") else text.readline(RECORD_BYTES)
    yield from raw_lines(uri, chain([line + rest], bounded_lines(text)), empty)


def parse(raw: RawRecord) -> Record:
    """Parse a raw record.

    Raises:
        DataError: 'MalformedRecord', with uri, line, column and text for a line that is not a JSON
            object; uri, record, character and text for an item of an array; uri and row for a row
            of CSV or Parquet.
    """
    if isinstance(raw.content, DataError):
        raise raw.content
    fields = raw.content
    if isinstance(fields, bytes):
        fields = _parse(raw.uri, raw.place, raw.unit, fields)
    return Record(fields, raw.uri, raw.place)


_OFFSETS: Final = {"line": "column", "record": "character"}
"""Unit of the character position in messages, by unit of the record."""


def _rule(unit: str, text: str) -> str:
    """The remedy for a text that is not a record."""
    rule = f"each {unit} must be one JSON object with fields"
    array = unit == "line" and text.lstrip().startswith("[")
    return f"{rule}; an object that is one array must be named .json" if array else rule


def _parse(uri: str, place: str, unit: str, data: bytes) -> Fields:
    text = decoded(uri, place, data)
    where = f"{uri}, {place}, {_OFFSETS[unit]}"
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            "MalformedRecord",
            f"{where} {error.pos + 1}: not JSON: {error.msg} at"
            f" {excerpt(text, error.pos)!r}; {_rule(unit, text)}",
        ) from None
    except ValueError:
        long = _LONG.search(text)
        raise DataError(
            "MalformedRecord",
            f"{where} {long.start() + 1 if long else 1}: a whole number of more than 4,300 digits;"
            " write it as a string",
        ) from None
    except RecursionError:
        raise _too_deep(uri, place) from None
    if data.count(b"[") + data.count(b"{") > MOST_DEPTH and _is_deep(value):
        raise _too_deep(uri, place)
    if not isinstance(value, dict) or not value:
        kind = "an empty object" if value == {} else f"a JSON {_kind(value)}"
        raise DataError(
            "MalformedRecord", f"{where} 1: {kind}: {excerpt(text)!r}; {_rule(unit, text)}"
        )
    for name in value if _HALF.search(text) else ():
        if is_broken([name, value[name]]):
            raise DataError(
                "MalformedRecord",
                f"{uri}, {place}: field {name!r} holds an unpaired surrogate (an escape from"
                " \\ud800 to \\udfff without its pair), which is not text; correct the record",
            )
    return value


def _too_deep(uri: str, place: str) -> DataError:
    return DataError(
        "MalformedRecord",
        f"{uri}, {place}: nested more than {MOST_DEPTH} levels deep; flatten the record",
    )


def _is_deep(value: Any) -> bool:
    """Whether a JSON value has more than ``MOST_DEPTH`` levels of arrays and objects."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MOST_DEPTH):
        inner = (v.values() if isinstance(v, dict) else v for v in level)
        level = [item for items in inner for item in items if isinstance(item, dict | list)]
        if not level:
            return False
    return True


def is_broken(value: Any) -> bool:
    """Whether a JSON value holds an unpaired surrogate: no tokenizer accepts it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _kind(value: Any) -> str:
    """JSON's name for the type of a value."""
    names = {list: "array", str: "string", bool: "boolean", type(None): "null", dict: "object"}
    return names.get(type(value), "number")
