"""Hostile data: each attack ends in a named failure with its place, in bounded memory and time; and
no bytes or records end in anything else than records or such a failure."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finetune_api.sources import Data, DataSource
from finetune_trainer.failures import DataError
from finetune_trainer.prepare.reading.records import MOST_DEPTH, SUFFIXES, Record, read_records
from finetune_trainer.prepare.reading.sources import Source
from finetune_trainer.prepare.rendering.chat import ChatTemplate
from finetune_trainer.prepare.rendering.examples import renderer
from finetune_trainer.prepare.task_formats import format_of
from trainer import untrusted
from trainer.prepare_helpers import CHATML, fault, lines, make_tokenizer, read, zstd

# --- attacks -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """What each attack ended in, in a process of its own, with lower limits."""
    command = [sys.executable, untrusted.__file__]
    ran = subprocess.run(command, check=True, capture_output=True, timeout=300)
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


@pytest.mark.parametrize("attack", untrusted.ATTACKS)
def test_an_attack_ends_with_its_place_in_bounded_memory(
    results: dict[str, Any], attack: str
) -> None:
    name, _, words = untrusted.ATTACKS[attack]
    found = results[attack]
    assert found["reason"] in ("MalformedObject", "MalformedRecord"), found
    assert found["message"].startswith(f"s3://b/{name}") and words in found["message"], found
    assert found["bytes"] < 128 * untrusted.MIB, found


def test_a_record_may_be_as_deep_as_the_limit() -> None:
    deep: Any = 1
    for _ in range(MOST_DEPTH - 1):
        deep = [deep]
    assert [r.fields for r in read("a.jsonl", lines({"a": deep}))] == [{"a": deep}]
    assert "nested more than" in fault("a.jsonl", lines({"a": [deep]})).message


def test_values_without_a_python_value_are_faults_of_their_row() -> None:
    far = pa.array([0, 2**62], pa.timestamp("us"))
    sink = io.BytesIO()
    pq.write_table(pa.table({"when": far, "text": ["a", "b"]}), sink)
    faults: list[DataError] = []
    sink.seek(0)
    found = list(read_records("s3://b/a.parquet", sink, faults.append))
    assert [r.place for r in found] == ["row 1"]
    assert "row 2: field 'when' of type timestamp" in faults[0].message


# --- fuzzing: bytes ------------------------------------------------------------------------------

RECORDS: Final[dict[str, list[dict[str, Any]]]] = {
    "Messages": [
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "u"},
                {"role": "assistant", "content": "a"},
            ]
        },
        {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
    ],
    "PromptCompletion": [{"prompt": "p", "completion": " c"}],
    "Instruction": [{"instruction": "i", "input": "x", "output": "o"}],
    "Classification": [{"text": "t", "label": "l"}],
    "Retrieval": [{"question": "q", "documents": ["a", "b"], "answer": "b"}],
    "Text": [{"text": "t"}],
}


def _csv(records: list[dict[str, Any]]) -> bytes:
    names = list(records[0])
    cells = [[str(r.get(n, "")).replace('"', '""') for n in names] for r in records]
    rows = [",".join(f'"{cell}"' for cell in row) for row in cells]
    return "\n".join([",".join(names), *rows]).encode()


def _parquet(records: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), sink)
    return sink.getvalue()


WRITERS: Final[dict[str, Any]] = {
    ".jsonl": lambda records: lines(*records),
    ".json": lambda records: json.dumps(records).encode(),
    ".csv": _csv,
    ".parquet": _parquet,
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".zst": zstd,
}


def _written(suffix: str, records: list[dict[str, Any]]) -> bytes:
    kind, packed = next((k, suffix.removeprefix(k)) for k in (".jsonl", ".json", ".csv", ".parquet")
                        if suffix.startswith(k))  # fmt: skip
    data: bytes = WRITERS[kind](records)
    return WRITERS[packed](data) if packed else data


SEEDS: Final = [
    (suffix, _written(suffix, records * 3)) for suffix in SUFFIXES for records in RECORDS.values()
]
EDITS: Final = st.lists(
    st.tuples(st.integers(0, 1 << 16), st.binary(max_size=4), st.integers(0, 6)), max_size=6
)


def _changed(data: bytes, edits: list[tuple[int, bytes, int]]) -> bytes:
    """Replace a few bytes at some places by others."""
    for at, new, length in edits:
        at %= len(data) + 1
        data = data[:at] + new + data[at + length :]
    return data


def _read_or_named(name: str, data: bytes) -> None:
    uri = f"s3://b/{name}"
    faults: list[DataError] = []
    try:
        for record in read_records(uri, io.BytesIO(data), faults.append):
            assert record.fields and record.where.startswith(uri)
    except DataError as error:
        faults.append(error)
    assert all(error.message.startswith(uri) for error in faults)


@settings(max_examples=80, derandomize=True, deadline=None)
@given(st.sampled_from(SUFFIXES), st.binary(max_size=200))
def test_any_bytes_are_records_or_a_named_fault(suffix: str, data: bytes) -> None:
    _read_or_named(f"a{suffix}", data)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.sampled_from(SEEDS), EDITS)
def test_damaged_objects_are_records_or_a_named_fault(
    seed: tuple[str, bytes], edits: list[tuple[int, bytes, int]]
) -> None:
    suffix, data = seed
    _read_or_named(f"a{suffix}", _changed(data, edits))


# --- fuzzing: records ----------------------------------------------------------------------------

VALUES: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def mutated(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A record of a format in which some values are others, missing, or have other names."""
    form = draw(st.sampled_from(list(RECORDS)))
    record = json.loads(json.dumps(draw(st.sampled_from(RECORDS[form]))))
    for _ in range(draw(st.integers(1, 3))):
        place: Any = record
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and draw(st.booleans()):
                place = place[key]
                continue
            if draw(st.integers(0, 3)):
                place[key] = draw(VALUES)
            else:
                del place[key]
            break
    return form, record


CHAT: Final = ChatTemplate(make_tokenizer(chat=CHATML), "s3://m")


@settings(max_examples=150, derandomize=True, deadline=None)
@given(mutated())
@example(("Messages", {"messages": [{"role": "user", "content": float("nan")}]}))
def test_any_record_is_examples_or_a_named_fault(made: tuple[str, dict[str, Any]]) -> None:
    form, fields = made
    where = "s3://b/a.jsonl, line 1"
    for spec in (
        DataSource(source="s3://b/a.jsonl", format=form),
        DataSource(source="s3://b/a.jsonl"),
    ):
        data = Data.model_validate({"train": [spec.to_json()]})
        record = Record(fields, "s3://b/a.jsonl", "line 1")
        try:
            found = format_of(spec, record, "CausalLM")
            for rendered in renderer(Source("train", "a", spec, []), found, data, CHAT)(record):
                assert rendered.where == where
        except DataError as error:
            assert error.message.startswith(where), error.message
