"""Failed jobs: the status names cause and remedy, and nothing is published.

All jobs are applied first and run in parallel: most of them end in prepare, in seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from cluster.api import eventually

pytestmark = pytest.mark.e2e

NOT_A_LABEL = {"text": "where is my parcel", "label": "delivery"}


@dataclass(frozen=True)
class Case:
    """A manifest that fails, and the expected failure in its status."""

    name: str
    failure_class: str
    reason: str
    words: tuple[str, ...]
    """Parts of the message: cause, location, remedy."""
    spec: dict[str, Any] = field(default_factory=dict)
    records: str | None = None
    """Training data as JSON Lines, instead of the quickstart's."""
    has_exit_code: bool = True


def lines(*records: Any) -> str:
    return "".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in records)


CASES = [
    Case("wrong-credentials", "Storage", "AccessDenied", ("AWS_SECRET_ACCESS_KEY",),
         {"storage": {"secretRef": {"name": "wrong-credentials"}}}),
    Case("missing-bucket", "Storage", "BucketNotFound", ("no-such-bucket",),
         {"output": {"destination": "s3://no-such-bucket/model"}}),
    Case("missing-model", "UserError", "ModelNotFound", ("s3://input/no-model", "config.json"),
         {"model": {"source": "s3://input/no-model"}}),
    Case("empty-data", "DataError", "EmptyDataSet", ("train.jsonl",), records=""),
    Case("malformed-line", "DataError", "MalformedRecord", ("train.jsonl", "line 3"),
         records=lines(NOT_A_LABEL, NOT_A_LABEL, '{"text": "broken', NOT_A_LABEL)),
    Case("missing-field", "DataError", "MissingField", ("train.jsonl", "line 2", "label"),
         records=lines(NOT_A_LABEL, {"text": "no label here"})),
    Case("nothing-learned", "DataError", "NothingSupervised", ("train.jsonl", "line 1"),
         {"template": {"prompt": "{{ text }}", "completion": "{{ '' }}"}},
         records=lines(NOT_A_LABEL)),
    Case("too-long", "DataError", "Overlength", ("train.jsonl", "line 2", "maxLength"),
         {"quality": {"overlength": "Fail"}},
         records=lines(NOT_A_LABEL, {"text": "word " * 2000, "label": "delivery"})),
    Case("no-image", "ImagePull", "ErrImagePull|ImagePullBackOff",
         ("localhost:5000/trainer:1", "spec.compute.image"),
         {"compute": {"image": "localhost:5000/trainer:1"}}, has_exit_code=False),
    Case("too-few-nodes", "Unschedulable", "Unschedulable", ("nodes",),
         {"compute": {"resources": {"requests": {"cpu": "1000"}}},
          "scheduling": {"startDeadlineSeconds": 20}}, has_exit_code=False),
    Case("diverged", "Diverged", "LossNotFinite", ("training.learningRate",),
         {"training": {"learningRate": "1e30", "warmupRatio": "0", "maxGradNorm": "0"},
          "compute": {"nodes": 1}}),
]  # fmt: skip


@pytest.fixture(scope="module")
def applied(platform, manifest_of) -> Iterator[None]:
    for case in CASES:
        platform.apply(manifest(platform, manifest_of, case))
    yield
    for case in CASES:
        platform.delete(case.name)


def manifest(platform, manifest_of, case: Case) -> dict[str, Any]:
    spec = dict(case.spec)
    template = spec.pop("template", None)
    quality = spec.pop("quality", None)
    made = manifest_of(case.name, **spec)
    data = made["spec"]["data"]
    if case.records is not None:
        source = f"s3://input/{case.name}/train.jsonl"
        platform.store.put(source, case.records.encode())
        data["train"] = [{"name": "broken", "source": source}]
        if template:
            data["train"][0]["template"] = template
    if quality:
        data["quality"] = quality
    return made


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_failure_names_its_cause_and_remedy(platform, applied, case: Case) -> None:
    status = platform.wait(case.name, "Failed", within=420)
    failure = status["failure"]
    assert failure["class"] == case.failure_class, failure
    assert failure["reason"] in case.reason.split("|"), failure
    for word in case.words:
        assert word in failure["message"], failure["message"]
    assert ("exitCode" in failure) == case.has_exit_code, failure
    assert status["phase"] == "Failed"
    assert "output" not in status
    stalled = next(c for c in status["conditions"] if c["type"] == "Stalled")
    assert stalled["status"] == "True"
    if "no-such-bucket" not in case.words:
        finished = [
            info.uri for info in platform.store.list(f"s3://output/{case.name}/")
            if ".workspace" not in info.uri
        ]  # fmt: skip
        assert not finished, "nothing is published"
    if case.failure_class != "Diverged":
        assert not platform.pods(case.name, "train") or not case.has_exit_code
    eventually("no pod is running", lambda: not active(platform, case.name), within=90)


def active(platform, name: str) -> list[str]:
    return [
        p["metadata"]["name"]
        for role in ("map", "prepare", "train", "publish")
        for p in platform.pods(name, role)
        if p["status"]["phase"] in ("Pending", "Running")
    ]


def test_an_invalid_spec_is_refused_by_the_api_server(platform, manifest_of) -> None:
    bad = manifest_of("refused", training={"epochs": 1, "maxSteps": 10})
    with pytest.raises(RuntimeError, match="epochs and maxSteps exclude each other"):
        platform.kubectl("apply", "-f", "-", stdin=json.dumps(bad))
    unknown = manifest_of("refused", training={"epoch": 1})
    with pytest.raises(RuntimeError, match=r'unknown field "spec\.training\.epoch"'):
        platform.kubectl("apply", "-f", "-", stdin=json.dumps(unknown))
