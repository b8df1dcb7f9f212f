"""Reading records: containers and formats, and faults with object, line, column and text."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.names import ENV_PVC_ROOT
from finetune_trainer.failures import DataError, UserError
from finetune_trainer.prepare.reading.csvrows import CELL_CHARACTERS
from finetune_trainer.prepare.reading.parquetrows import PARQUET_ROWS
from finetune_trainer.prepare.reading.records import SUFFIXES, read_records
from finetune_trainer.prepare.reading.sources import DataObject, resolve
from finetune_trainer.storage import claim_paths
from finetune_trainer.storage.objectstream import Opened, open_stream
from trainer.prepare_helpers import fault, lines, read, zstd

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
RECORDS = st.lists(st.dictionaries(TEXT, TEXT | st.integers() | st.none(), min_size=1), max_size=8)


def rows_of(*rows: list[str]) -> bytes:
    """Rows as CSV, written by Python's csv module."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode("utf-8")


@given(RECORDS)
def test_json_lines_are_read_plain_and_compressed(records: list[dict[str, Any]]) -> None:
    data = lines(*records)
    assert [r.fields for r in read("a.jsonl", data)] == records
    assert [r.fields for r in read("a.json.gz", gzip.compress(data))] == records
    assert [r.fields for r in read("a.jsonl.zst", zstd(data))] == records


NAMES = st.lists(TEXT.filter(lambda t: t.strip("\ufeff")), min_size=1, max_size=4, unique=True)


@given(NAMES.filter(lambda names: names[0][0] != "\ufeff"), st.data())
def test_csv_is_read_as_it_was_written(names: list[str], data: st.DataObject) -> None:
    cells = st.lists(TEXT, min_size=len(names), max_size=len(names))
    rows = data.draw(st.lists(cells, max_size=6))
    written = rows_of(names, *rows)
    for name, held in {
        "a.csv": written,
        "b.csv": b"\xef\xbb\xbf" + written,
        "c.csv.gz": gzip.compress(written),
        "d.csv.zst": zstd(written),
    }.items():
        found = read(name, held)
        assert [r.fields for r in found] == [dict(zip(names, row, strict=True)) for row in rows]
        assert [r.place for r in found] == [f"row {i}" for i in range(1, len(rows) + 1)]


def test_csv_places_count_rows_instead_of_lines() -> None:
    found = read("a.csv", b'a,b\r\n"1\n2",3\r\n\r\n4,"5 ""six"""')
    assert [(r.fields["a"], r.fields["b"], r.where) for r in found] == [
        ("1\n2", "3", "s3://b/a.csv, row 1"),
        ("4", '5 "six"', "s3://b/a.csv, row 2"),
    ]


def test_reading_continues_after_dropped_rows() -> None:
    faults: list[DataError] = []
    data = b'a,b\n1,2\n3\n4,\xff\n5,"6"7\n8,9\n'
    found = list(read_records("s3://b/a.csv", io.BytesIO(data), faults.append))
    assert [(r.fields["a"], r.place) for r in found] == [("1", "row 1"), ("8", "row 5")]
    assert [f.reason for f in faults] == ["MalformedRecord"] * 3


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (b"1\n", "1 fields, the header has 2"),
        (b"1,2,3\n", "3 fields, the header has 2"),
        (b'1,"2"3\n', "not CSV"),
        (b'1,"2\n3,4\n', "unexpected end of data"),
        (b"1," + b"x" * (CELL_CHARACTERS + 1) + b"\n", "field larger than field limit"),
    ],
)
def test_a_malformed_row_is_named(row: bytes, words: str) -> None:
    error = fault("a.csv", b"a,b\n1,2\n" + row)
    assert isinstance(error, DataError) and error.reason == "MalformedRecord"
    assert "s3://b/a.csv, row 2:" in error.message and words in error.message


def test_empty_lines_byte_order_mark_and_missing_last_newline_are_accepted() -> None:
    records = read("a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": 2}')
    assert [(r.fields["a"], r.where) for r in records] == [
        (1, "s3://b/a.jsonl, line 1"),
        (2, "s3://b/a.jsonl, line 4"),
    ]


def test_parquet_is_read_in_batches_with_row_numbers() -> None:
    count = 2 * PARQUET_ROWS + 7
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": [str(i) for i in range(count)]}), sink, row_group_size=900)
    records = read("a.parquet", sink.getvalue())
    assert [r.fields for r in records] == [{"text": str(i)} for i in range(count)]
    assert records[-1].where == f"s3://b/a.parquet, row {count}"


def test_parquet_lists_of_messages_are_plain_lists() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"messages": messages}]), sink)
    assert read("a.parquet", sink.getvalue())[0].fields == {"messages": messages}


def test_nulls_in_parquet_structs_are_removed() -> None:
    rows: list[dict[str, Any]] = [
        {"calls": [{"arguments": {"x": 1}}, {"arguments": {"y": "b"}}], "label": "a"},
        {"calls": [], "label": None},
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    assert [r.fields for r in read("a.parquet", sink.getvalue())] == rows


@pytest.mark.parametrize(
    ("line", "column", "shown"),
    [
        (b'{"a": 1,}', 9, "'{\"a\": 1,}'"),
        (b'{"a": 1} {"b": 2}', 10, '{"b": 2}'),
        (b'{"a": "' + b"x" * 5000 + b'" "b": 1}', 5010, "…"),
        (b"not json", 1, "not json"),
        (b'[{"a": 1}]', 1, "JSON array"),
        (b'[{"a": 1},', 12, "an object that is one array must be named .json"),
        (b"17", 1, "JSON number"),
        (b"{}", 1, "an empty object"),
    ],
)
def test_a_malformed_line_is_named_with_line_column_and_text(
    line: bytes, column: int, shown: str
) -> None:
    error = fault("a.jsonl", b'{"a": 1}\n\n' + line + b"\n")
    assert isinstance(error, DataError) and error.reason == "MalformedRecord"
    assert f"s3://b/a.jsonl, line 3, column {column}:" in error.message
    assert shown in error.message
    assert len(error.message) < 400


def test_a_fault_in_a_compressed_object_has_the_decompressed_line() -> None:
    data = lines(*({"a": i} for i in range(5000))) + b"{oops\n"
    assert "a.jsonl.gz, line 5001, column 2" in fault("a.jsonl.gz", gzip.compress(data)).message


def test_text_that_is_not_utf8_is_named_with_its_byte() -> None:
    error = fault("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n')
    assert error.reason == "MalformedRecord" and "line 2, byte 8" in error.message
    error = fault("a.csv", b"a,b\n1,\xff\n")
    assert error.reason == "MalformedRecord" and "line 2, byte 3" in error.message


def test_an_unpaired_surrogate_is_named_and_a_pair_is_read() -> None:
    whole = b'{"a": "\\ud83d\\ude00", "b": "\\\\ud83d"}\n'
    assert read("a.jsonl", whole)[0].fields == {"a": "😀", "b": "\\ud83d"}
    for broken in (b'{"t": ["a\\ud800b"]}', b'{"a": "x", "t": {"\\uDFFF": 1}}'):
        error = fault("a.jsonl", whole + broken)
        assert isinstance(error, DataError) and error.reason == "MalformedRecord"
        assert "line 2: field 't' holds an unpaired surrogate" in error.message


def test_a_number_of_too_many_digits_is_named_with_its_column() -> None:
    error = fault("a.jsonl", b'{"a": ' + b"7" * 5000 + b"}")
    assert isinstance(error, DataError) and error.reason == "MalformedRecord"
    assert "line 1, column 7: " in error.message and len(error.message) < 200


def test_parquet_text_that_is_not_utf8_is_named_and_can_be_dropped() -> None:
    texts = pa.array([b"a", b"\xff", b"b"]).view(pa.string())
    sink = io.BytesIO()
    pq.write_table(pa.table({"id": [1, 2, 3], "text": texts}), sink)
    error = fault("a.parquet", sink.getvalue())
    assert isinstance(error, DataError) and error.reason == "MalformedRecord"
    assert "row 2: field 'text' is not UTF-8" in error.message
    faults: list[DataError] = []
    sink.seek(0)
    found = list(read_records("s3://b/a.parquet", sink, faults.append))
    assert [r.place for r in found] == ["row 1", "row 3"] and len(faults) == 1


def test_personal_data_in_messages_is_masked() -> None:
    for name, data in (
        ("a.jsonl", b'{"a": "jo.doe@example.org" oops}'),
        ("a.csv", b"jo.doe@example.org,a,a\n"),
    ):
        message = fault(name, data).message
        assert "[EMAIL]" in message and "doe" not in message


def test_a_csv_index_column_is_refused_with_its_remedy() -> None:
    error = fault("a.csv", b",text,label\n0,a,b\n")
    assert error.reason == "MalformedObject" and "index=False" in error.message


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl.gz", gzip.compress(lines(*({"a": i} for i in range(99))))[:-20]),
        ("a.jsonl.gz", b'{"a": 1}\n'),
        ("a.json.gz", gzip.compress(b"[" + b'{"a": 1},' * 99)[:-20]),
        ("a.json.zst", zstd(b"[" + b'{"a": 1},' * 99)[:-20]),
        ("a.jsonl.zst", zstd(lines(*({"a": i} for i in range(99))))[:-20]),
        ("a.jsonl.zst", b'{"a": 1}\n'),
        ("a.csv.gz", b"a,b\n"),
        ("a.csv", b"a,a\n1,2\n"),
        ("a.csv", b"a,\n1,2\n"),
        ("a.parquet", b'{"a": 1}\n'),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # gzip data contains a timestamp
)
def test_a_damaged_object_is_named(name: str, data: bytes) -> None:
    error = fault(name, data)
    assert isinstance(error, DataError) and error.reason == "MalformedObject"
    assert f"s3://b/{name}" in error.message


def test_an_unknown_suffix_is_refused_with_the_supported_ones() -> None:
    error = fault("a.txt", b"")
    assert isinstance(error, UserError) and ".parquet" in error.message


# --- objects that change -------------------------------------------------------------------------


class Half:
    """A response body whose connection ends halfway through the object."""

    def __init__(self, data: bytes) -> None:
        self._rest = io.BytesIO(data[: len(data) // 2])

    def read(self, amount: int) -> bytes:
        return self._rest.read(amount)

    def close(self) -> None:
        pass


def parquet(records: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), sink)
    return sink.getvalue()


KINDS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    ".jsonl": lambda records: lines(*records),
    ".json": lambda records: json.dumps(records, indent=4).encode(),
    ".csv": lambda records: rows_of(["a"], *([r["a"]] for r in records)),
    ".parquet": parquet,
}
PACKERS: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "zst": zstd}


def object_of(suffix: str) -> tuple[list[dict[str, Any]], bytes]:
    """Records, and an object that holds them."""
    records = [{"a": json.dumps(i)} for i in range(2000)]
    _, kind, *packed = suffix.split(".")
    data = KINDS[f".{kind}"](records)
    return records, PACKERS[packed[0]](data) if packed else data


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_object_that_changes_while_it_is_read_is_refused(suffix: str) -> None:
    records, data = object_of(suffix)
    assert [r.fields for r in read(f"a{suffix}", data)] == records

    def opener(position: int, etag: str | None) -> Opened:
        if position > 0:  # the object has been replaced
            raise DataError("ObjectChanged", "it was replaced")
        return Opened(Half(data), len(data), "1")

    stream = open_stream(opener, None)
    with pytest.raises(DataError) as caught:
        list(read_records(f"s3://b/a{suffix}", stream, lambda error: None))
    assert caught.value.reason == "ObjectChanged"


@pytest.fixture
def listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, bytes], tuple[Path, DataObject]]:
    """``listed(name, data)``: a file on a claim and its listed object, read in small buffers."""
    monkeypatch.setattr(claim_paths, "BUFFER_BYTES", 64)
    monkeypatch.setenv(ENV_PVC_ROOT, str(tmp_path))

    def write(name: str, data: bytes) -> tuple[Path, DataObject]:
        path = tmp_path / "claim" / name
        path.parent.mkdir()
        path.write_bytes(data)
        os.utime(path, (10**9, 10**9))  # a coarse clock would hide the change
        found = resolve(f"pvc://claim/{name}", NO_STORE)
        return path, found[0]

    return write


NO_STORE: Any = None
Listed = Callable[[str, bytes], tuple[Path, DataObject]]


def in_place(path: Path) -> None:
    """Overwrite a file with other bytes of the same length."""
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))


def by_rename(path: Path) -> None:
    other = path.with_name("new")
    other.write_bytes(bytes(path.stat().st_size))
    other.replace(path)


@pytest.mark.parametrize("change", [in_place, by_rename, Path.unlink])
def test_a_file_that_is_replaced_before_it_is_read_is_refused(
    listed: Listed, change: Callable[[Path], None]
) -> None:
    path, item = listed("a.jsonl", b"{}")
    change(path)
    with pytest.raises(DataError, match=r"pvc://claim/a\.jsonl: .*spec\.rerunToken") as caught:
        item.open()
    assert caught.value.reason == "ObjectChanged"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_is_rewritten_while_it_is_read_is_refused(listed: Listed, suffix: str) -> None:
    records, data = object_of(suffix)
    path, item = listed(f"a{suffix}", data)
    with item.open() as stream:
        assert [r.fields for r in read_records(item.uri, stream)] == records
    with item.open() as stream:
        assert stream.read(2) == data[:2]
        in_place(path)
        stream.seek(0)
        with pytest.raises(DataError, match=re.escape(item.uri)) as caught:
            list(read_records(item.uri, stream, lambda error: None))
    assert caught.value.reason == "ObjectChanged"


def test_a_file_that_is_rewritten_is_refused_in_a_single_read(listed: Listed) -> None:
    path, item = listed("a.jsonl", bytes(1000))
    with item.open() as stream:
        in_place(path)
        with pytest.raises(DataError, match="replaced"):
            stream.read()


def test_an_open_file_that_is_replaced_by_renaming_is_read_unchanged(listed: Listed) -> None:
    records, data = object_of(".jsonl")
    path, item = listed("a.jsonl", data)
    with item.open() as stream:
        assert stream.read(2) == data[:2]
        by_rename(path)
        stream.seek(0)
        assert [r.fields for r in read_records(item.uri, stream)] == records
    with pytest.raises(DataError, match="replaced"):
        item.open()
