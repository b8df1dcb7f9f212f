"""Records out of objects: JSON and CSV (plain, gzip, zstd) and Parquet, one at a time.

Memory is flat: an object is a stream, never a list. Every record knows the object and the line (or
row, or number in an array) that it came from, and so does every complaint about one.
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
"""Endings of object names that are read."""

PARQUET_ROWS: Final = 1024
"""Rows that are decoded at once."""

_HALF: Final = re.compile(r"\\u[dD][89a-fA-F]")
"""Half of a character, as JSON escapes it; two of them make one."""

_LONG: Final = re.compile(r"\d{4301}")
"""More digits than Python makes a number of."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record and where it stands."""

    fields: Fields
    uri: str
    place: str
    """``line 3``, ``row 3``, or ``record 3`` of an array, counted from 1."""

    @property
    def where(self) -> str:
        """``s3://bucket/key, line 3``."""
        return f"{self.uri}, {self.place}"


def readable(uri: str) -> bool:
    """Whether the object's name ends in one of ``SUFFIXES``."""
    return uri.endswith(SUFFIXES)


def read_records(uri: str, stream: BinaryIO, complain: Complain = refuse) -> Iterator[Record]:
    """All records of one object, in order; empty lines are passed over.

    Args:
        uri: the object's address; its ending tells how it is read, and of .json the first
            character whether it is one array.
        stream: the object, from its beginning (seekable, for Parquet).
        complain: is told 'MalformedRecord' (uri, line, column, text) where a line is no JSON
            object, (uri, record, character, text) where an item of an array is none, or (uri, row)
            where a row of CSV or Parquet is none.

    Raises:
        UserError: 'UnknownObjectType' for another ending.
        DataError: 'MalformedObject' where the object as a whole cannot be read, and what
            ``complain`` raises.
    """
    if not readable(uri):
        raise UserError(
            "UnknownObjectType",
            f"{uri}: the name must end in one of {', '.join(SUFFIXES)}; rename the object, or give"
            " a pattern that leaves it out",
        )
    if uri.endswith(".parquet"):
        yield from _read_parquet(uri, stream, complain)
        return
    name, text = unpack(uri, stream)
    if name.endswith(".csv"):
        for row, fields in csv_rows(uri, without_mark(text), complain):
            yield Record(fields, uri, f"row {row}")
    elif name.endswith(".json"):
        yield from _read_json(uri, text, complain)
    else:
        yield from read_lines(uri, without_mark(text), complain)


def read_lines(
    uri: str, lines: Iterable[bytes], complain: Complain = refuse, before: int = 0
) -> Iterator[Record]:
    """The records of lines of JSON.

    Args:
        complain: as ``read_records`` says.
        before: lines of the object before these.
    """
    filled = ((n, line) for n, line in enumerate(lines, before + 1) if line and not line.isspace())
    return _parsed(uri, _LINE, filled, complain)


def _read_json(uri: str, text: BinaryIO, complain: Complain) -> Iterator[Record]:
    """The records of one array or of JSON Lines, as the first character tells."""
    empty, line = beginning(text)
    opening, bracket, behind = line.partition(b"[")
    if bracket and not opening.strip():
        return _parsed(uri, _ITEM, enumerate(array_items(uri, text, behind), 1), complain)
    rest = b"" if line.endswith(b"\n") else text.readline()
    return read_lines(uri, chain([line + rest], text), complain, empty)


class _Unit(NamedTuple):
    """What holds one record of JSON, in the words of messages."""

    name: str
    offset: str
    """What its characters are counted as."""

    def rule(self, text: str) -> str:
        """What to do about a text that is no record."""
        rule = f"each {self.name} must be one JSON object with fields"
        array = self == _LINE and text.lstrip().startswith("[")
        return f"{rule}; an object that is one array must be named .json" if array else rule


_LINE: Final = _Unit("line", "column")
_ITEM: Final = _Unit("record", "character")


def _parsed(
    uri: str, unit: _Unit, texts: Iterable[tuple[int, bytes]], complain: Complain
) -> Iterator[Record]:
    """The records of numbered texts."""
    for number, text in texts:
        place = f"{unit.name} {number}"
        try:
            fields = _parse(uri, place, unit, text)
        except DataError as error:
            complain(error)
        else:
            yield Record(fields, uri, place)


def _parse(uri: str, place: str, unit: _Unit, data: bytes) -> Fields:
    text = decoded(uri, place, data)
    where = f"{uri}, {place}, {unit.offset}"
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            "MalformedRecord",
            f"{where} {error.pos + 1}: not JSON: {error.msg} at"
            f" {excerpt(text, error.pos)!r}; {unit.rule(text)}",
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
            "MalformedRecord", f"{where} 1: {kind}: {excerpt(text)!r}; {unit.rule(text)}"
        )
    for name in value if _HALF.search(text) else ():
        if is_broken([name, value[name]]):
            raise DataError(
                "MalformedRecord",
                f"{uri}, {place}: field {name!r} holds half of a character (an escape from"
                " \\ud800 to \\udfff without its other half), which is no text; correct the record",
            )
    return value


def is_broken(value: Any) -> bool:
    """Whether there is half of a character in a value out of JSON: no tokenizer takes it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _kind(value: Any) -> str:
    """What JSON calls a value."""
    names = {list: "array", str: "string", bool: "boolean", type(None): "null", dict: "object"}
    return names.get(type(value), "number")


def _read_parquet(uri: str, stream: BinaryIO, complain: Complain) -> Iterator[Record]:
    row = 0
    try:
        table = pq.ParquetFile(pa.PythonFile(stream, mode="r"))
        for batch in table.iter_batches(batch_size=PARQUET_ROWS):
            for i in range(len(batch)):
                row += 1
                try:
                    fields = _row(uri, row, batch, i)
                except DataError as error:
                    complain(error)
                else:
                    yield Record(fields, uri, f"row {row}")
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise DataError(
            "MalformedObject",
            f"{uri}: cannot be read as Parquet after row {row}: {str(error).splitlines()[0]};"
            " write the file again",
        ) from None


def _row(uri: str, row: int, batch: Any, i: int) -> Fields:
    fields = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            fields[name] = _without_nulls(column[i].as_py())
        except UnicodeDecodeError:
            raise DataError(
                "MalformedRecord",
                f"{uri}, row {row}: field {name!r} is not UTF-8 text; write the file from UTF-8",
            ) from None
    return fields


def _without_nulls(value: Any) -> Any:
    """Structs of Parquet have every key that any row has: a null in one is a key that this row
    lacks (the argument of another tool), and must not be learned as a null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
