"""Names of runs and child objects: valid, within length limits, and unique per job and run."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from finetune_api.identity import (
    child_base,
    child_name,
    data_uri,
    label_value,
    output_uri,
    run_id,
    run_spec_name,
    run_uri,
)
from finetune_api.names import ROLES

LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
SERVICE = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LABEL_VALUE = re.compile(r"[A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?")
MOST_PODS = 1023
"""Highest completion index: spec.compute.nodes is at most 1,024."""

part = st.from_regex(r"[a-z0-9]([-a-z0-9]{0,40}[a-z0-9])?", fullmatch=True)
job_names = st.lists(part, min_size=1, max_size=8).map(".".join).filter(lambda n: len(n) <= 253)
uids = st.uuids().map(str)
numbers = st.integers(1, 99_999)


@given(job_names, uids, numbers, st.sampled_from(ROLES), st.integers(1, 999))
def test_children_have_valid_names(
    job: str, uid: str, number: int, role: str, revision: int
) -> None:
    name = child_name(job, run_id(number, uid), role, revision)  # type: ignore[arg-type]
    assert SERVICE.fullmatch(name), "a Service's name begins with a letter"
    assert len(f"{name}-{MOST_PODS}") <= 63, "a pod's host name is a DNS label"
    run_spec = run_spec_name(job, run_id(number, uid), revision)
    assert LABEL.fullmatch(run_spec)
    assert len(run_spec) <= 63


@given(job_names, job_names, uids, numbers)
def test_two_jobs_share_no_name(one: str, other: str, uid: str, number: int) -> None:
    assume(one != other)
    run = run_id(number, uid)
    assert child_base(one, run) != child_base(other, run)


@given(job_names, uids, uids, numbers)
def test_a_recreated_job_has_other_names(job: str, one: str, other: str, number: int) -> None:
    assume(one[:5] != other[:5])
    assert child_base(job, run_id(number, one)) != child_base(job, run_id(number, other))


@given(job_names, uids, st.lists(numbers, min_size=2, max_size=2, unique=True))
def test_two_runs_share_no_name(job: str, uid: str, two: list[int]) -> None:
    first, second = (child_base(job, run_id(number, uid)) for number in two)
    assert first != second


@given(job_names)
def test_the_jobs_name_fits_a_label(job: str) -> None:
    value = label_value(job)
    assert LABEL_VALUE.fullmatch(value)
    assert len(value) <= 63
    if len(job) <= 63:
        assert value == job


@pytest.mark.parametrize(
    ("job", "base"),
    [
        ("support-bot", "support-bot-3-0f9c2"),
        ("7b", "j7b-925a7b-3-0f9c2"),
        ("team.bot", "team-bot-148ded-3-0f9c2"),
    ],
)
def test_examples(job: str, base: str) -> None:
    run = run_id(3, "0F9C2A11-aaaa-bbbb-cccc-000000000000")
    assert run == "3-0f9c2"
    assert child_base(job, run) == base


def test_addresses() -> None:
    assert run_uri("s3://w", "job", "1-abcde") == "s3://w/runs/job/1-abcde"
    assert data_uri("s3://w", "d1") == "s3://w/data/d1"
    assert output_uri("s3://out/", "1-abcde") == "s3://out/1-abcde"
