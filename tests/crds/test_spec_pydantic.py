"""Pydantic's side of the table of specs."""

from __future__ import annotations

import pytest

from crds.spec_rows import Row
from crds.spec_table import BAD, GOOD, ROWS
from finetune_api.base import InvalidSpec
from finetune_api.spec import parse_spec


def test_the_table_is_large_and_its_names_differ() -> None:
    assert len(ROWS) >= 70
    assert len({row.name for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", GOOD, ids=lambda row: row.name)
def test_good(row: Row) -> None:
    spec = parse_spec(row.spec)
    assert parse_spec(spec.to_json()) == spec, "its own JSON reads back as the same spec"


@pytest.mark.parametrize("row", BAD, ids=lambda row: row.name)
def test_bad(row: Row) -> None:
    with pytest.raises(InvalidSpec) as refused:
        parse_spec(row.spec)
    (problem,) = refused.value.problems
    path, message = problem.split(": ", 1)
    assert path == row.path
    assert row.allowed.lower() in message.lower()
    if row.got is not None:
        assert row.got in message


def test_every_problem_has_a_line() -> None:
    with pytest.raises(InvalidSpec) as refused:
        parse_spec({"model": {"source": "x"}, "data": {"train": []}, "extra": 1})
    assert [line.split(": ")[0] for line in refused.value.problems] == [
        "spec.model.source",
        "spec.data.train",
        "spec.output",
        "spec.extra",
    ]


def test_a_number_that_must_be_text_is_shown_in_quotes() -> None:
    with pytest.raises(InvalidSpec, match=r'write it in quotes: "0\.1"'):
        parse_spec({**GOOD[0].spec, "training": {"dropout": 0.1}})
