"""Termination messages fit the limit of Kubernetes, and can be parsed."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.base import read_known
from finetune_api.names import FailureClass
from finetune_api.results import TERMINATION_LIMIT, Failure, Progress, StartupPart, Termination

anything = st.text(max_size=6000)  # with surrogates, which file names may contain
addresses = st.from_regex(r"s3://[a-z]{3,20}/[a-zé/]{0,1000}", fullmatch=True)
figures = st.floats(allow_nan=False, allow_infinity=False)
metrics = st.dictionaries(st.sampled_from(["Loss", "F1", "Bleu"]), figures)

failures = st.builds(
    lambda kind, reason, message, retryable: {
        "class": kind, "reason": reason, "message": message, "retryable": retryable,
    },
    st.sampled_from(get_args(FailureClass)), st.from_regex(r"[A-Z][a-z]{1,60}", fullmatch=True),
    anything, st.booleans(),
)  # fmt: skip
summaries = st.builds(
    lambda checkpoint, scores: {
        "attempt": 3, "restarts": 1, "steps": 100, "checkpoint": checkpoint, "scores": scores,
        "startup": {
            "seconds": dict.fromkeys(get_args(StartupPart), 1 / 3), "fromStep": 7,
            "firstStep": 1.7e9 + 1 / 3,
        },
    },
    st.none() | addresses,
    st.lists(st.fixed_dictionaries({
        "name": st.from_regex(r"[a-z]{1,63}", fullmatch=True), "samples": st.integers(0, 2**53),
        "base": metrics, "tuned": metrics,
    }), max_size=60),
)  # fmt: skip
prepared = st.builds(
    lambda uri, dropped, stages: {
        "digest": "d" * 64, "uri": uri, "reused": False, "trainSamples": 1, "validationSamples": 1,
        "testSamples": 1, "trainTokens": 1, "supervisedTokens": 1, "dropped": dropped,
        "totalSteps": 1, "stages": stages,
    },
    addresses, st.dictionaries(st.text(max_size=200), st.integers(0), max_size=40),
    st.lists(st.fixed_dictionaries({
        "name": st.from_regex(r"[a-z]{1,63}", fullmatch=True), "steps": st.integers(1, 2**53),
        "mixture": st.dictionaries(
            st.from_regex(r"[a-z]{1,63}", fullmatch=True), figures, max_size=64
        ),
    }), max_size=16),
)  # fmt: skip


def said(**parts: Any) -> Termination:
    given_parts = {key: value for key, value in parts.items() if value is not None}
    return Termination.model_validate({"run": "12-0f9c2", "role": "train", **given_parts})


@given(st.none() | failures, st.none() | summaries, st.none() | prepared)
def test_message_fits_and_can_be_parsed(failure: Any, trained: Any, prepared: Any) -> None:
    word = said(failure=failure, trained=trained, prepared=prepared)
    text = word.to_text()
    assert len(text.encode()) <= TERMINATION_LIMIT
    back = Termination.model_validate(json.loads(text))
    assert (back.run, back.role) == (word.run, word.role)
    assert (back.failure is None) == (word.failure is None)
    if back.failure and word.failure:
        same = {"message": ""}
        assert back.failure.model_copy(update=same) == word.failure.model_copy(update=same)


@given(failures.filter(lambda f: len(f["message"]) < 600 and f["message"].isascii()))
def test_short_message_is_not_cut(failure: dict[str, Any]) -> None:
    word = said(failure=failure)
    assert Termination.model_validate(json.loads(word.to_text())) == word


def test_a_long_message_keeps_both_ends() -> None:
    """A message begins with the problem and ends with the remedy."""
    message = "line 7 is malformed: " + "ü" * 9000 + " mend the line"
    text = said(
        failure={"class": "DataError", "reason": "MalformedRecord", "message": message}
    ).to_text()
    kept = Failure.model_validate(json.loads(text)["failure"]).message
    assert kept.startswith("line 7 is malformed: ")
    assert kept.endswith(" mend the line")
    assert len(kept) > 1000


def test_scores_are_cut_before_the_message() -> None:
    scores = [
        {"name": f"set-{n}", "samples": 1, "base": {"Loss": 1.5}, "tuned": {"Loss": 0.5}}
        for n in range(100)
    ]
    word = said(
        failure={"class": "Internal", "reason": "Late", "message": "x" * 1000},
        trained={"attempt": 1, "restarts": 0, "steps": 9, "scores": scores},
    )
    back = Termination.model_validate(json.loads(word.to_text()))
    assert back.failure == word.failure
    assert back.trained is not None
    assert (back.trained.steps, back.trained.scores) == (9, [])


def test_comparisons_are_cut_before_the_scores() -> None:
    compared = {"effect": -1.0, "low": -2.0, "high": -0.5, "p": 0.01, "test": "SignFlip"}
    scores = [
        {
            "name": f"set-{n}", "samples": 1, "base": {"Loss": 1.5}, "tuned": {"Loss": 0.5},
            "comparisons": {"Loss": {**compared, "verdict": "Better"}},
        }
        for n in range(25)
    ]  # fmt: skip
    word = said(trained={"attempt": 1, "restarts": 0, "steps": 9, "scores": scores})
    back = Termination.model_validate(json.loads(word.to_text()))
    assert back.trained is not None and len(back.trained.scores) == 25
    assert not any(found.comparisons for found in back.trained.scores)


def test_stages_are_cut_before_the_message() -> None:
    mixture = {f"set-{n}": 0.0125 for n in range(64)}
    stages = [{"name": f"stage-{n}", "steps": 9, "mixture": mixture} for n in range(16)]
    figures = dict.fromkeys(
        ("trainSamples", "validationSamples", "testSamples", "trainTokens", "supervisedTokens"), 1
    )
    summary = {"digest": "d", "uri": "s3://b/d", "reused": False, "totalSteps": 144, **figures}
    word = said(
        failure={"class": "Internal", "reason": "Late", "message": "x" * 1000},
        prepared={**summary, "stages": stages},
    )
    back = Termination.model_validate(json.loads(word.to_text()))
    assert back.failure == word.failure
    assert back.prepared is not None
    assert (back.prepared.total_steps, back.prepared.stages) == (144, [])


@pytest.mark.parametrize(
    "odd",
    [
        {"remainingSeconds": float("nan")}, {"updated": float("inf")}, {"step": 10**400},
        {"step": -1}, {"remainingSeconds": 1e300}, {"latestCheckpoint": "s3://" + "x" * 5000},
        {"epoch": 1e300}, {"bySource": {f"s{i}": 1.0 for i in range(100)}},
        {"dataStage": "x" * 300},
        {"startup": {"seconds": {"import": 1.0}, "fromStep": -1, "firstStep": 1.0}},
    ],
)  # fmt: skip
def test_figures_that_status_cannot_hold_are_left_out(odd: dict[str, Any]) -> None:
    """The image of a pod may be the user's own, and report anything."""
    raw = {"run": "1-abcde", "attempt": 1, "restarts": 0, "stage": "Training", "loss": 2.5}
    found = read_known(Progress, {**raw, **odd})
    assert found == Progress.model_validate(raw)
