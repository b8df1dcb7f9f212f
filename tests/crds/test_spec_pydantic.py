"""The table of specs with pydantic."""

from __future__ import annotations

from typing import Any

import pytest

from crds.spec_rows import Row, changed, sources
from crds.spec_table import BAD, GOOD, ROWS
from finetune_api.base import InvalidSpec
from finetune_api.spec import parse_spec


def test_table_is_large_and_names_are_unique() -> None:
    assert len(ROWS) >= 70
    assert len({row.name for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", GOOD, ids=lambda row: row.name)
def test_good(row: Row) -> None:
    spec = parse_spec(row.spec)
    assert parse_spec(spec.to_json()) == spec, "JSON round trip"


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


def test_every_problem_is_reported_on_its_own_line() -> None:
    with pytest.raises(InvalidSpec) as refused:
        parse_spec({"model": {"source": "x"}, "data": {"train": []}, "extra": 1})
    assert [line.split(": ")[0] for line in refused.value.problems] == [
        "spec.model.source",
        "spec.data.train",
        "spec.output",
        "spec.extra",
    ]


def test_error_for_an_unquoted_number_shows_it_in_quotes() -> None:
    with pytest.raises(InvalidSpec, match=r'write it in quotes: "0\.1"'):
        parse_spec({**GOOD[0].spec, "training": {"dropout": 0.1}})


UNKNOWN = "spec.{}: unknown field; did you mean {}?"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"metod": {}}, UNKNOWN.format("metod", "method")),
        ({"training.epoch": 3}, UNKNOWN.format("training.epoch", "epochs")),
        ({"training.max_steps": 3}, UNKNOWN.format("training.max_steps", "maxSteps")),
        ({"method.lora.useDORA": True}, UNKNOWN.format("method.lora.useDORA", "useDora")),
        (
            {"data.train": sources({"templates": {}})},
            UNKNOWN.format("data.train[0].templates", "template"),
        ),
        (
            {"data.train": sources({"storage": {"secretref": {}}})},
            UNKNOWN.format("data.train[0].storage.secretref", "secretRef"),
        ),
        (
            {"data.stages": [{"name": "a", "share": "1", "weights": [{"nam": "a"}]}]},
            UNKNOWN.format("data.stages[0].weights[0].nam", "name"),
        ),
        (
            {"prepare.tolerations": [{"efect": "NoSchedule"}]},
            UNKNOWN.format("prepare.tolerations[0].efect", "effect"),
        ),
        (
            {"zebra": 1},
            "spec.zebra: unknown field; see docs/reference.md for the fields there are",
        ),
        ({"method.type": "lora"}, "got 'lora'; did you mean LoRA?"),
        ({"evaluation.metrics": ["Loss", "BLEU"]}, "got 'BLEU'; did you mean Bleu?"),
        ({"training.precision": "bf_16"}, "got 'bf_16'; did you mean BF16?"),
        ({"output.format": "Zebra"}, "got 'Zebra'"),
    ],
)
def test_error_suggests_the_closest_known_name(change: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidSpec) as refused:
        parse_spec(changed(change))
    assert [line for line in refused.value.problems if line.endswith(told)]
