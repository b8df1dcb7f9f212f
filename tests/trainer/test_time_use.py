"""The account of the time of training processes: no second is in two classes or in none."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.time_use import HANG_SECONDS, TimeUse
from finetune_trainer.train import time_recorder as recorder_module
from finetune_trainer.train.time_recorder import TimeRecorder

UNIX = 1_000_000.0


class Time:
    """A clock that only the test advances."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def unix(self) -> float:
        return UNIX + self.now


@pytest.fixture(autouse=True)
def always_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "idle_seconds", lambda: 0.0)


def started(time: Time, earlier: TimeUse | None = None, processes: int = 2) -> TimeRecorder:
    """A recorder of a process that was launched at 80 and started at 90; it is 100."""
    made = TimeRecorder(80.0, 90.0, time, time.unix)
    saved: list[TimeUse] = []
    made.claimed(3, processes, earlier, lambda: saved[-1] if saved else None)
    made.commits = saved  # type: ignore[attr-defined]
    return made


def seconds(use: TimeUse) -> dict[str, float]:
    return {name: spent for name, spent in use.seconds.items() if spent}


def test_every_second_of_an_attempt_has_a_class() -> None:
    time = Time()
    recorder = started(time)
    time.now = 130
    with recorder.of("evaluation"):
        time.now = 135
    time.now = 140
    recorder.training()
    time.now = 150
    recorder.stepped(1, compiled=6.0)
    time.now = 152
    recorder.stepped(2, compiled=6.0)
    with recorder.of("evaluation"):
        time.now = 155
        with recorder.of("checkpoint"):
            time.now = 156
            kept = recorder.use(saved=True)
        time.now = 157
    time.now = 160
    first = recorder.use()
    assert seconds(first) == {
        "launch": 20, "load": 90, "compile": 12, "evaluation": 2 * (5 + 4), "checkpoint": 2,
    }  # fmt: skip
    assert first.uncommitted == 2 * (4 + 2 + 3), "no checkpoint has these steps yet"
    recorder.commits.append(kept)  # type: ignore[attr-defined]
    found = recorder.use()
    assert (found.seconds["productive"], found.uncommitted) == (12, 6)
    assert found.total == 2 * (160 - 80), "no second in two classes, or in none"
    assert (found.began, found.until) == (UNIX + 90, UNIX + 160)
    assert found.text.startswith("load 56 %")


def test_steps_done_again_after_a_rollback_are_recomputed() -> None:
    time = Time()
    recorder = started(time, processes=1)
    recorder.training()
    for number in (1, 2, 3, 2, 3, 4):
        time.now += 10
        recorder.stepped(number)
    found = recorder.use()
    assert (found.seconds["recomputed"], found.uncommitted) == (20, 40)


def test_an_attempt_goes_on_from_the_account_of_the_earlier_ones() -> None:
    time = Time()
    earlier = use(seconds={"productive": 500.0, "recomputed": 7.0})
    recorder = started(time, earlier)
    recorder.commits.append(earlier)  # type: ignore[attr-defined]
    recorder.training()
    time.now += 5
    found = recorder.use()
    assert (found.attempt, found.processes) == (3, 2)
    assert (found.seconds["productive"], found.seconds["recomputed"]) == (500, 7)
    assert (found.uncommitted, found.seconds["launch"]) == (10, 20)
    assert recorder.use(saved=True).seconds["productive"] == 510


def use(**fields: Any) -> TimeUse:
    given_ = {"attempt": 1, "processes": 2, "began": 0, "until": 1000, "progressed": 1000} | fields
    return TimeUse.model_validate(given_)


@pytest.mark.parametrize(
    ("fields", "end", "recomputed", "hang"),
    [
        ({"uncommitted": 40.0}, 1000, 40, 0),
        ({"uncommitted": 40.0}, 1003, 46, 0),
        ({"uncommitted": 40.0}, 990, 40, 0),
        ({"uncommitted": 40.0, "progressed": 950}, 1005, 50, 0),
        # 900 s without progress in two processes; they were in the open step.
        ({"uncommitted": 1840.0, "progressed": 100}, 1000, 40, 1800),
        # They were in an evaluation, whose time is not taken back.
        ({"uncommitted": 40.0, "progressed": 100}, 1000, 0, 40),
        # The account ended 100 s before the process did.
        ({"progressed": 1000}, 1100, 0, 200),
    ],
)
def test_the_end_of_an_attempt(
    fields: dict[str, Any], end: float, recomputed: float, hang: float
) -> None:
    found = use(**fields).ended(end)
    assert (found.seconds.get("recomputed", 0), found.seconds.get("hang", 0)) == (recomputed, hang)
    assert found.uncommitted == 0


@given(
    st.floats(0, 1e6), st.floats(0, 1000), st.floats(0, 5000), st.floats(0, 500), st.integers(1, 64)
)
def test_the_end_of_an_attempt_keeps_the_sum(
    uncommitted: float, progressed: float, end: float, productive: float, processes: int
) -> None:
    before = use(
        uncommitted=uncommitted, progressed=progressed, processes=processes,
        seconds={"productive": productive},
    )  # fmt: skip
    after = before.ended(end)
    assert min(after.seconds.values(), default=0) >= 0
    later = max(0.0, end - before.until) * processes
    assert after.total == pytest.approx(before.total + later, rel=1e-9, abs=1e-3)
    if end - progressed <= HANG_SECONDS:
        assert "hang" not in after.seconds
