"""The order: complete, stable, and refused where it is of another version."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crds.spec_table import GOOD, changed
from finetune_api.base import InvalidSpec
from finetune_api.order import CONTRACT_VERSION, RunOrder, parse_order


def order(change: dict[str, Any] | None = None) -> RunOrder:
    return RunOrder.model_validate(
        {
            "version": CONTRACT_VERSION,
            "job": {"namespace": "team", "name": "bot", "uid": "0f9c2a11"},
            "run": "1-0f9c2",
            "spec": changed(change or {}),
        }
    )


@given(st.sampled_from(GOOD))
def test_text_reads_back(row: Any) -> None:
    first = order(row.change)
    back = parse_order(first.to_text())
    assert back == first
    assert back.to_text() == first.to_text()


def test_defaults_are_written_out() -> None:
    """So that a later default cannot reach a run that has begun."""
    spec = json.loads(order().to_text())["spec"]
    assert spec["training"]["batchSize"] == 32
    assert spec["data"]["split"] == {"validation": "0.05", "test": "0.05", "seed": 0}


@pytest.mark.parametrize("version", [0, CONTRACT_VERSION + 1, None, "1"])
def test_another_version_is_refused(version: object) -> None:
    raw = {**json.loads(order().to_text()), "version": version}
    with pytest.raises(InvalidSpec, match=rf"order\.version: .* got {version!r}"):
        parse_order(json.dumps(raw))


def test_what_is_no_order_is_refused() -> None:
    with pytest.raises(InvalidSpec, match=r"order\.version"):
        parse_order("[]")
    with pytest.raises(InvalidSpec, match=r"order\.spec\.model: required"):
        parse_order(json.dumps({"version": CONTRACT_VERSION, "run": "1-a", "spec": {}}))


def test_equal_access_is_one_profile() -> None:
    own = {"endpoint": "http://minio:9000", "secretRef": {"name": "minio"}}
    run = order(
        {
            "storage": {"secretRef": {"name": "main"}, "workspace": "s3://scratch"},
            "model.storage": own,
            "data.train": [{"source": "s3://data/a"}, {"source": "s3://data/b", "storage": own}],
            "data.test": [
                {"source": "s3://data/c", "storage": {"secretRef": {"name": "main"}}},
                {"source": "s3://data/d", "storage": {"region": "eu-west-1"}},
            ],
        }
    )
    train, test = run.spec.data.train, run.spec.data.test or []
    assert run.profile_of(None) == 0
    assert run.profile_of(run.spec.model.storage) == run.profile_of(train[1].storage) == 1
    assert run.profile_of(test[0].storage) == 0, "spelled out, it is that of the job"
    assert run.profile_of(test[1].storage) == 2
    assert [p.region for p in run.storage_profiles] == ["us-east-1", "us-east-1", "eu-west-1"]


def test_addresses() -> None:
    run = order({"output.destination": "s3://models/tuned/"})
    assert run.run_uri == "s3://models/tuned/.workspace/runs/bot/1-0f9c2"
    assert run.output_uri == "s3://models/tuned/1-0f9c2"
