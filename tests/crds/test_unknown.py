"""Documents that another release has written: what this release does not know is passed over, and
kept where it is written back."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from pydantic import model_validator

from finetune_api.base import read_known, with_unknown
from finetune_api.results import Progress, Termination
from finetune_api.status import FineTuneJobStatus

TIME = "2026-01-01T12:00:00Z"
RUN = {"id": "2-abcde", "number": 2, "startTime": TIME}
READY = {
    "type": "Ready", "status": "True", "lastTransitionTime": TIME, "reason": "Complete",
    "message": "",
}  # fmt: skip
STATUS: dict[str, Any] = {
    "phase": "Training",
    "run": RUN,
    "conditions": [READY],
    "usage": {"gpuSeconds": 7, "goodput": "0.5", "queuedSeconds": 3},
    "restarts": 1,
}


def read(raw: Any) -> dict[str, Any]:
    return read_known(FineTuneJobStatus, raw).to_json()


def changed(**fields: Any) -> dict[str, Any]:
    return {**copy.deepcopy(STATUS), **fields}


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (STATUS, STATUS),
        (changed(grade="Better"), STATUS),
        (changed(run={**RUN, "lostTime": {"hang": 3}}), STATUS),
        (changed(usage={**STATUS["usage"], "idle": [1, 2]}), STATUS),
        (changed(conditions=[{**READY, "severity": "Info"}]), STATUS),
        (changed(phase="Healing"), {k: v for k, v in STATUS.items() if k != "phase"}),
        (changed(restarts="many"), changed(restarts=0)),
        # An item without a required field is left out; the other items stay.
        (changed(conditions=[{"type": "Odd", "status": "Perhaps"}, READY]), STATUS),
        (changed(run={"id": "2-abcde"}), {k: v for k, v in STATUS.items() if k != "run"}),
        (changed(conditions={"Ready": True}), changed(conditions=[])),
        (
            changed(run={**RUN, "outcome": "Cancelled"}),
            changed(run={**RUN, "outcome": "Cancelled"}),
        ),
    ],
)
def test_status(raw: dict[str, Any], expected: dict[str, Any]) -> None:
    before = copy.deepcopy(raw)
    assert read(raw) == read(expected)
    assert raw == before, "the stored document is not changed"


def test_a_failure_class_of_another_release_is_kept() -> None:
    failure = {"class": "Stalled", "reason": "NoProgress", "message": "no step for 600 s"}
    found = read_known(Termination, {"run": "1-abcde", "role": "train", "failure": failure})
    assert found.failure is not None and found.failure.failure_class == "Stalled"
    assert read(changed(failure=failure))["failure"] == failure


@pytest.mark.parametrize(
    "raw",
    [7, "text", [], {"role": "train"}, "[" * 4096, '{"a":' * 5000, b"\xff", json.dumps([[[]]] * 9)],
)
def test_what_is_no_such_document_is_refused(raw: Any) -> None:
    """A user's image may leave anything as its termination message."""
    with pytest.raises(ValueError):
        read_known(Termination, raw)


def test_many_unknown_fields_are_left_out_at_once() -> None:
    """Within the operator's event loop: one validation, not one for each of them."""
    raw = {"run": "1-abcde", "attempt": 1, "restarts": 0, "stage": "Training"}
    odd = {f"field{i}": i for i in range(5000)}
    rounds = 0

    class Counting(Progress):
        @model_validator(mode="before")
        @classmethod
        def count(cls, value: Any) -> Any:
            nonlocal rounds
            rounds += 1
            return value

    found = read_known(Counting, json.dumps(raw | odd))
    assert found.run == "1-abcde" and rounds == 2


def test_unknown_fields_are_kept_where_a_document_is_written_back() -> None:
    stored = changed(
        grade="Better", run={**RUN, "lostTime": {"hang": 3}}, progress={"speed": "fast"}
    )
    new = read(stored) | {"phase": "Complete"}
    kept = with_unknown(FineTuneJobStatus, stored, new)
    assert kept["grade"] == "Better" and kept["run"]["lostTime"] == {"hang": 3}
    assert kept["phase"] == "Complete" and "progress" not in kept
    assert {k: v for k, v in kept.items() if k not in ("grade", "run")} == {
        k: v for k, v in new.items() if k != "run"
    }
