"""Objects that are one JSON array: records equal those of JSON Lines, faults name the record, and
memory holds one record."""

from __future__ import annotations

import gzip
import io
import json
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.failures import DataError
from finetune_trainer.prepare.reading import arrays
from finetune_trainer.prepare.reading.records import read_records
from trainer.prepare_helpers import fault, lines, read, zstd

MARK = b"\xef\xbb\xbf"
TEXT = st.text(st.characters(exclude_categories=("Cs",)) | st.sampled_from('"\\[]{},\n'))
NUMBERS = st.integers() | st.integers(-(10**99), 10**99) | st.floats(allow_nan=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
RECORDS = st.lists(st.dictionaries(TEXT, VALUES, min_size=1, max_size=4), max_size=5)
WRITING = st.fixed_dictionaries(
    {
        "indent": st.none() | st.integers(0, 4) | st.sampled_from(["\t", "\r\n"]),
        "separators": st.sampled_from([(",", ":"), (" , ", " : "), None]),
        "ensure_ascii": st.booleans(),
    }
)
SPACE = st.text(" \t\r\n", max_size=5).map(str.encode)


@given(RECORDS, WRITING, st.sampled_from([b"", MARK]), SPACE, SPACE, st.integers(1, 40))
def test_an_array_has_the_records_of_json_lines(
    records: list[dict[str, Any]], writing: dict[str, Any], mark: bytes, before: bytes,
    behind: bytes, block: int,
) -> None:  # fmt: skip
    expected = repr([r.fields for r in read("a.jsonl", lines(*records))])
    data = mark + before + json.dumps(records, **writing).encode() + behind
    with patch.object(arrays, "BLOCK", block):
        for name, held in {
            "a.json": data,
            "a.json.gz": gzip.compress(data),
            "a.json.zst": zstd(data),
        }.items():
            found = read(name, held)
            assert repr([r.fields for r in found]) == expected
            assert [r.place for r in found] == [f"record {i + 1}" for i in range(len(records))]


def test_json_lines_in_a_json_object_are_read_by_line() -> None:
    found = read("a.json", MARK + b' \n\r\n{"a": [1]}\n\n{"a": [2]}')
    assert [(r.fields["a"], r.where) for r in found] == [
        ([1], "s3://b/a.json, line 3"),
        ([2], "s3://b/a.json, line 5"),
    ]
    long = {"a": "x" * (3 << 20)}
    assert [r.fields for r in read("a.json", lines(long, long))] == [long, long]
    assert read("a.json", b"") == read("a.json", MARK + b" \n") == []


def test_numbers_and_repeated_keys_are_read_like_json_lines() -> None:
    record = b'{"a": 1, "a": -0, "b": 1E5, "c": -0.0, "d": 1e999, "e": 0.1, "f": NaN, "g": %d}'
    record %= 10**4299
    (found,) = read("a.json", b"[" + record + b"]")
    assert repr(found.fields) == repr(json.loads(record))


FAULTS = {
    b"[1, [2]]": ", character 1: a JSON array",
    b'"{[,"': ", character 1: a JSON string",
    b"null": ", character 1: a JSON null",
    b"17": ", character 1: a JSON number",
    b"{}": ", character 1: an empty object",
    b'{"a": 1,}': ", character 9: not JSON",
    b'{"a": 1} {"a": 2}': ", character 10: not JSON: Extra data",
    b'{"a": [1}, "b": 2]': ", character 9: not JSON",
    b'{"a": "line\nbreak"}': ", character 12: not JSON: Invalid control character",
    b'{"a": "x", "t": {"\\uDFFF": 1}}': ": field 't' holds an unpaired surrogate",
    b'{"t": "a\\ud800\\ud800b"}': ": field 't' holds an unpaired surrogate",
    b'{"t": "\xff"}': ", byte 8: not UTF-8 text",
    b'{"t": "\xed\xa0\x80"}': ", byte 8: not UTF-8 text",
    b'{"a": -' + b"7" * 5000 + b"}": ", character 8: a whole number of more than 4,300 digits",
    b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}": ": nested more than 100 levels",
}


@pytest.mark.parametrize("item", FAULTS)
def test_a_malformed_record_is_named_and_can_be_dropped(item: bytes) -> None:
    data = b'[\n  {"a": 1},\n  ' + item + b',\n  {"a": 3}\n]\n'
    error = fault("a.json", data)
    assert isinstance(error, DataError) and error.reason == "MalformedRecord"
    assert f"s3://b/a.json, record 2{FAULTS[item]}" in error.message and len(error.message) < 400
    faults: list[DataError] = []
    found = list(read_records("s3://b/a.json", io.BytesIO(data), faults.append))
    assert [(r.fields, r.place) for r in found] == [({"a": 1}, "record 1"), ({"a": 3}, "record 3")]
    assert [f.message for f in faults] == [error.message]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"[", "record 1: the object ends before"),
        (b'[{"a": 1}', "record 1: the object ends before"),
        (b'[{"a": 1},', "record 2: the object ends before"),
        (b'[{"a": 1}, {"a": "\\"', "record 2: the object ends before"),
        (b'[{"a": 1}, {"a": "x]', "record 2: the object ends before"),
        (b'[{"a": 1},\n]', "record 2: there is ']' where it should begin"),
        (b'[{"a": 1},, {"a": 2}]', "record 2: there is ',' where it should begin"),
        (b"[,]", "record 1: there is ',' where it should begin"),
        (b'[{"a": 1}}]', "record 1: it has an unmatched '}'"),
        (b'[{"a": 1}]]', "record 1: there is text after it"),
        (b'[{"a": 1}]\n[{"a": 2}]', "record 1: there is text after it"),
        (b'[{"a": 1}]' + b" " * 99 + b"x", "record 1: there is text after it"),
    ],
)
@pytest.mark.parametrize("block", [1, 1 << 16])
def test_a_broken_array_is_named_with_its_record(data: bytes, words: str, block: int) -> None:
    with patch.object(arrays, "BLOCK", block):
        error = fault("a.json", data)
    assert isinstance(error, DataError) and error.reason == "MalformedObject"
    assert f"s3://b/a.json, {words}" in error.message and "write it again" in error.message


def test_an_unclosed_quote_does_not_read_the_whole_object() -> None:
    data = b'[{"a": 1}, {"a": "1" tape"}' + b', {"a": "b"}' * 9999 + b"]"
    stream = io.BytesIO(data)
    with patch.object(arrays, "BLOCK", 64), patch.object(arrays, "RECORD_BYTES", 1000):
        with pytest.raises(DataError, match="record 2: it does not end within") as caught:
            list(read_records("s3://b/a.json", stream))
        long = {"a": "x" * 500}
        assert read("a.json", json.dumps([long] * 9).encode())[-1].fields == long
    assert caught.value.reason == "MalformedObject"


def test_the_first_record_is_yielded_before_the_rest_is_read() -> None:
    for indent in (None, 2):
        stream = io.BytesIO(json.dumps([{"a": "x" * 99}] * 200_000, indent=indent).encode())
        next(read_records("s3://b/a.json", stream))
        assert stream.tell() <= 2 << 20
