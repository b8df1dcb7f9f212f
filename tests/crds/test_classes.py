"""The table of field classes: it covers every field of the spec, and has no unused entry."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crds.spec_good import GOOD
from finetune_api.classes import FIELD_CLASSES, changed_classes, class_digest, field_class
from finetune_api.reference import leaves
from finetune_api.schema import structural
from finetune_api.spec import FineTuneJobSpec, parse_spec

LEAVES = sorted(leaves(structural(FineTuneJobSpec, root="spec"), ""))
SPECS = st.sampled_from([parse_spec(row.spec).to_json() for row in GOOD])


@pytest.mark.parametrize("leaf", LEAVES)
def test_every_field_has_a_class(leaf: str) -> None:
    assert field_class(leaf) in ("Live", "Resume", "NewRun")


def deciding_row(leaf: str) -> str:
    parts = leaf.split(".")
    prefixes = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next(prefix for prefix in prefixes if prefix in FIELD_CLASSES)


def test_no_entry_is_unused() -> None:
    assert {deciding_row(leaf) for leaf in LEAVES} == set(FIELD_CLASSES)


def test_no_entry_repeats_the_class_of_its_parent() -> None:
    for path in FIELD_CLASSES:
        parent = path.rpartition(".")[0]
        if parent:
            assert FIELD_CLASSES[path] != field_class(parent), f"{path} repeats {parent}"


def test_an_unknown_field_is_an_error() -> None:
    with pytest.raises(KeyError, match="nonsense"):
        field_class("nonsense.at.all")


@given(SPECS, SPECS)
def test_changes_are_found_and_classified(old: dict[str, Any], new: dict[str, Any]) -> None:
    found = changed_classes(old, new)
    assert (not found) == (old == new)
    assert changed_classes(new, old) == found
    for kind, paths in found.items():
        for path in paths:
            assert field_class(path) == kind
            assert at(old, path) != at(new, path)


@given(SPECS, SPECS)
def test_reported_changes_are_complete(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Copying the changed fields into the old spec gives the new one."""
    moved = parse_spec(old).to_json()
    for paths in changed_classes(old, new).values():
        for path in paths:
            put(moved, path, at(new, path))
    assert moved == new


def at(spec: dict[str, Any], path: str) -> Any:
    """The value at a path; of a list of blocks, the values of its items."""
    value: Any = spec
    first, _, rest = path.partition(".")
    if isinstance(value, list):
        return [at(item, path) for item in value]
    value = value.get(first) if isinstance(value, dict) else None
    return at(value, rest) if rest else value


def put(spec: Any, path: str, value: Any) -> None:
    if isinstance(spec, list):
        for item, own in zip(spec, value, strict=True):
            put(item, path, own)
        return
    last, _, rest = path.partition(".")
    if rest:
        put(spec.setdefault(last, {}), rest, value)
    elif value is None:
        spec.pop(last, None)
    else:
        spec[last] = value


@pytest.mark.parametrize(
    ("change", "kind", "path"),
    [
        ({"suspend": True}, "Live", "suspend"),
        ({"compute": {"nodes": 2}}, "Resume", "compute.nodes"),
        ({"storage": {"workspace": "s3://elsewhere"}}, "NewRun", "storage.workspace"),
        ({"storage": {"secretRef": {"name": "other"}}}, "Resume", "storage.secretRef"),
        ({"training": {"microBatchTokens": 512}}, "Resume", "training.microBatchTokens"),
        ({"training": {"seed": 1}}, "NewRun", "training.seed"),
        ({"data": {"train": [{"source": "s3://data/other"}]}}, "NewRun", "data.train.source"),
        ({"rerunToken": "again"}, "NewRun", "rerunToken"),
    ],
)
def test_examples(change: dict[str, Any], kind: str, path: str) -> None:
    old = GOOD[0].spec
    new = parse_spec({**old, **change}).to_json()
    assert changed_classes(parse_spec(old).to_json(), new) == {kind: [path]}


def test_a_renamed_secret_of_a_data_set_is_no_new_run() -> None:
    def spec(secret: str, source: str = "s3://data/a.jsonl") -> dict[str, Any]:
        storage = {"endpoint": "https://s3.example.com", "secretRef": {"name": secret}}
        sets = [{"source": source, "storage": storage}, {"source": "s3://data/b.jsonl"}]
        made = {**GOOD[0].spec, "data": {"train": sets}}
        return parse_spec(
            {**made, "model": {"source": "s3://m/base", "storage": storage}}
        ).to_json()

    assert changed_classes(spec("old"), spec("new")) == {
        "Resume": ["data.train.storage.secretRef.name", "model.storage.secretRef.name"]
    }
    both = changed_classes(spec("old"), spec("new", "s3://data/c.jsonl"))
    assert both["NewRun"] == ["data.train.source"]


@given(SPECS, SPECS)
def test_digests_tell_changes_by_class(old: dict[str, Any], new: dict[str, Any]) -> None:
    found = changed_classes(old, new)
    for kind in ("Live", "Resume", "NewRun"):
        assert (class_digest(old, kind) == class_digest(new, kind)) == (kind not in found)
