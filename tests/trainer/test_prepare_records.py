"""Reading records: what is read, and how a fault is named (object, line, column, text)."""

from __future__ import annotations

import gzip
import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.failures import DataError, TrainerError, UserError
from finetune_trainer.prepare.records import PARQUET_ROWS, Record, read_records
from trainer.prepare_helpers import lines

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
RECORDS = st.lists(st.dictionaries(TEXT, TEXT | st.integers() | st.none(), min_size=1), max_size=8)


def read(name: str, data: bytes) -> list[Record]:
    return list(read_records(f"s3://b/{name}", io.BytesIO(data)))


def fault(name: str, data: bytes) -> TrainerError:
    with pytest.raises(TrainerError) as caught:
        read(name, data)
    return caught.value


@given(RECORDS)
def test_json_lines_are_read_plain_and_compressed(records: list[dict[str, Any]]) -> None:
    data = lines(*records)
    assert [r.fields for r in read("a.jsonl", data)] == records
    assert [r.fields for r in read("a.json.gz", gzip.compress(data))] == records


def test_empty_lines_a_byte_order_mark_and_a_missing_last_newline_do_no_harm() -> None:
    records = read("a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": 2}')
    assert [(r.fields["a"], r.where) for r in records] == [
        (1, "s3://b/a.jsonl, line 1"),
        (2, "s3://b/a.jsonl, line 4"),
    ]


def test_parquet_is_read_over_batches_with_row_numbers() -> None:
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


@pytest.mark.parametrize(
    ("line", "column", "shown"),
    [
        (b'{"a": 1,}', 9, "'{\"a\": 1,}'"),
        (b'{"a": 1} {"b": 2}', 10, '{"b": 2}'),
        (b'{"a": "' + b"x" * 5000 + b'" "b": 1}', 5010, "…"),
        (b"not json", 1, "not json"),
        (b'[{"a": 1}]', 1, "JSON array"),
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


def test_a_fault_in_a_compressed_object_has_the_line_of_its_text() -> None:
    data = lines(*({"a": i} for i in range(5000))) + b"{oops\n"
    assert "a.jsonl.gz, line 5001, column 2" in fault("a.jsonl.gz", gzip.compress(data)).message


def test_text_that_is_not_utf8_is_named_with_its_byte() -> None:
    error = fault("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n')
    assert error.reason == "MalformedRecord" and "line 2, byte 8" in error.message


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl.gz", gzip.compress(lines(*({"a": i} for i in range(99))))[:-20]),
        ("a.jsonl.gz", b'{"a": 1}\n'),
        ("a.parquet", b'{"a": 1}\n'),
    ],
)
def test_a_damaged_object_is_named(name: str, data: bytes) -> None:
    error = fault(name, data)
    assert isinstance(error, DataError) and error.reason == "MalformedObject"
    assert f"s3://b/{name}" in error.message


def test_another_ending_is_refused_with_those_that_are_read() -> None:
    error = fault("a.csv", b"")
    assert isinstance(error, UserError) and ".parquet" in error.message
