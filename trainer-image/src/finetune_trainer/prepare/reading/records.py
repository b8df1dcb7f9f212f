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

import pyarrow as pa
import pyarrow.parquet as pq

from finetune_trainer.failures import DataError, UserError
from finetune_trainer.prepare.quality.personal import excerpt
from finetune_trainer.prepare.reading.arrays import array_items
from finetune_trainer.prepare.reading.csvrows import csv_rows
from finetune_trainer.prepare.reading.faults import Complain, refuse
from finetune_trainer.prepare.reading.lines import PACKED, beginning, decoded, unpack, without_mark

Fields = dict[str, Any]

SUFFIXES: Final = (
    *(kind + ending for kind in (".jsonl", ".json", ".csv") for ending in ("", *PACKED)),
    ".parquet",
)
"""Name suffixes of supported objects."""

PARQUET_ROWS: Final = 1024
"""Rows decoded per batch."""

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
        yield from _raw_parquet(uri, stream)
        return
    name, text = unpack(uri, stream)
    if name.endswith(".csv"):
        for row, fields in csv_rows(uri, without_mark(text)):
            yield RawRecord(uri, "row", row, fields)
    elif name.endswith(".json"):
        yield from _raw_json(uri, text)
    else:
        yield from raw_lines(uri, without_mark(text))


def raw_lines(uri: str, lines: Iterable[bytes], before: int = 0) -> Iterator[RawRecord]:
    """Yield the records of JSON lines.

    Args:
        before: number of lines of the object before these.
    """
    for number, line in enumerate(lines, before + 1):
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
    rest = b"" if line.endswith(b"\n") else text.readline()
    yield from raw_lines(uri, chain([line + rest], text), empty)


def parse(raw: RawRecord) -> Record:
    """Parse a raw record.

    Raises:
        DataError: 'MalformedRecord', with uri, line, column and text for a line that is not a JSON
            object; uri, record, character and text for an item of an array; uri and row for a row
            of CSV or Parquet.
    """
    place = f"{raw.unit} {raw.number}"
    if isinstance(raw.content, DataError):
        raise raw.content
    if isinstance(raw.content, bytes):
        return Record(_parse(raw.uri, place, raw.unit, raw.content), raw.uri, place)
    return Record(raw.content, raw.uri, place)


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
        raise DataError(
            "MalformedRecord", f"{uri}, {place}: nested too deeply; flatten the record"
        ) from None
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


def _raw_parquet(uri: str, stream: BinaryIO) -> Iterator[RawRecord]:
    row = 0
    try:
        table = pq.ParquetFile(pa.PythonFile(stream, mode="r"))
        for batch in table.iter_batches(batch_size=PARQUET_ROWS):
            for i in range(len(batch)):
                row += 1
                yield RawRecord(uri, "row", row, _row(uri, row, batch, i))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise DataError(
            "MalformedObject",
            f"{uri}: cannot be read as Parquet after row {row}: {str(error).splitlines()[0]};"
            " write the file again",
        ) from None


def _row(uri: str, row: int, batch: Any, i: int) -> Fields | DataError:
    fields = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            fields[name] = _without_nulls(column[i].as_py())
        except UnicodeDecodeError:
            return DataError(
                "MalformedRecord",
                f"{uri}, row {row}: field {name!r} is not UTF-8 text; write the file from UTF-8",
            )
    return fields


def _without_nulls(value: Any) -> Any:
    """Remove null fields of structs. A Parquet struct has the keys of all rows: a null is a key
    that this row lacks (the argument of another tool), and must not be trained as a null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
