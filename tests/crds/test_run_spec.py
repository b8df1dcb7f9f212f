"""The run spec: complete, stable, and refused if its contract version differs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crds.spec_good import GOOD
from crds.spec_rows import changed
from finetune_api.base import InvalidSpec
from finetune_api.run_spec import CONTRACT_VERSION, RunSpec, TunedBase, parse_run_spec, tuned_base
from finetune_api.sources import ModelLocation, StorageAccess
from finetune_api.spec import parse_spec


def run_spec(change: dict[str, Any] | None = None) -> RunSpec:
    return RunSpec.model_validate(
        {
            "version": CONTRACT_VERSION,
            "job": {"namespace": "team", "name": "bot", "uid": "0f9c2a11"},
            "run": "1-0f9c2",
            "spec": changed(change or {}),
        }
    )


@given(st.sampled_from(GOOD))
def test_text_survives_a_round_trip(row: Any) -> None:
    first = run_spec(row.change)
    if first.spec.model.fine_tune_job_ref is not None:
        first = first.model_copy(update={"base": TunedBase(job="a", run="1-a", uri="s3://m/1-a")})
    back = parse_run_spec(first.to_text())
    assert back == first
    assert back.to_text() == first.to_text()


def test_defaults_are_written_out() -> None:
    """A changed default must not affect a run that has begun."""
    spec = json.loads(run_spec().to_text())["spec"]
    assert spec["training"]["batchSize"] == 32
    assert spec["data"]["split"] == {"validation": "0.05", "test": "0.05", "seed": 0}


@pytest.mark.parametrize("version", [0, CONTRACT_VERSION + 1, None, "1"])
def test_another_version_is_refused(version: object) -> None:
    raw = {**json.loads(run_spec().to_text()), "version": version}
    with pytest.raises(InvalidSpec, match=rf"runSpec\.version: .* got {version!r}"):
        parse_run_spec(json.dumps(raw))


def test_text_that_is_not_a_run_spec_is_refused() -> None:
    with pytest.raises(InvalidSpec, match=r"runSpec\.version"):
        parse_run_spec("[]")
    with pytest.raises(InvalidSpec, match=r"runSpec\.spec\.model: required"):
        parse_run_spec(json.dumps({"version": CONTRACT_VERSION, "run": "1-a", "spec": {}}))


def test_equal_access_settings_share_one_profile() -> None:
    own = {"endpoint": "http://minio:9000", "secretRef": {"name": "minio"}}
    run = run_spec(
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
    assert run.profile_of(test[0].storage) == 0, "equal to spec.storage"
    assert run.profile_of(test[1].storage) == 2
    assert [p.region for p in run.storage_profiles] == ["us-east-1", "us-east-1", "eu-west-1"]


def test_addresses() -> None:
    run = run_spec({"output.destination": "s3://models/tuned/"})
    assert run.run_uri == "s3://models/tuned/.workspace/runs/bot/1-0f9c2"
    assert run.output_uri == "s3://models/tuned/1-0f9c2"


FOLLOWER = {"model": {"fineTuneJobRef": {"name": "bot"}}}
BOTH = {"output.format": "Both"}


def test_a_model_reference_without_a_base_is_refused() -> None:
    with pytest.raises(
        InvalidSpec, match=r"runSpec\.base: required with spec\.model\.fineTuneJobRef"
    ):
        parse_run_spec(run_spec(FOLLOWER).to_text())


def after(before: RunSpec, change: dict[str, Any]) -> RunSpec:
    """Return the run spec of a run that starts from the published model of the run ``before``."""
    spec = parse_spec(changed(change))
    base = tuned_base(before, "sha", spec)
    return before.model_copy(update={"spec": spec, "base": base})


def test_a_merged_base_has_nothing_beneath() -> None:
    run = after(run_spec(BOTH), FOLLOWER)
    assert run.base == TunedBase(
        job="bot", run="1-0f9c2", uri="s3://models/tuned/1-0f9c2", digest="sha"
    )
    assert run.base_model == ModelLocation(source="s3://models/tuned/1-0f9c2")


def test_adapter_and_its_base_keep_their_own_storage() -> None:
    near = {"endpoint": "http://near:9000", "secretRef": {"name": "near"}}
    far = {"endpoint": "http://far:9000", "secretRef": {"name": "far"}}
    first = run_spec({"storage": near, "model.storage": far})
    run = after(first, FOLLOWER)
    assert run.base is not None and run.base.beneath is not None
    assert run.base.beneath.source == "s3://models/base"
    places = [run.base.storage, run.base.beneath.storage]
    assert [run.profile_of(place) for place in places] == [1, 2]
    assert [p.endpoint for p in run.storage_profiles] == [
        None, "http://near:9000", "http://far:9000"]  # fmt: skip

    beside = after(first, {**FOLLOWER, "storage": near})
    assert beside.base is not None and beside.base.storage is None, "its own storage"
    own = StorageAccess.model_validate(far)
    chosen = after(first, {"model": {**FOLLOWER["model"], "storage": far}})
    assert chosen.base is not None and chosen.base.storage == own, "the spec decides"


def test_beneath_is_the_full_model_below_all_adapters() -> None:
    second = after(run_spec(), FOLLOWER)
    third = after(second, FOLLOWER)
    assert third.base is not None and third.base.beneath == ModelLocation(source="s3://models/base")
    tuned = after(after(run_spec(BOTH), FOLLOWER), FOLLOWER)
    assert tuned.base is not None and tuned.base.beneath is not None
    assert tuned.base.beneath.source == "s3://models/tuned/1-0f9c2/merged"
