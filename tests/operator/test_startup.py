"""Time from a run's start to its first step: the report that counts, and the parts."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from operator_world import PREPARED, T0, TRAINED, World, at_training, train
from prometheus_client import generate_latest

from finetune_api.results import Startup
from finetune_operator.metrics import Metrics
from finetune_operator.status.startup import startup
from finetune_operator.store import Store
from finetune_operator.world.children import JobView
from finetune_operator.world.pods import PodView


def after(seconds: float) -> Any:
    return T0 + timedelta(seconds=seconds)


JOB = JobView(name="j", role="train", run="1-a", revision=1, created=after(40))


def pod(index: int, created: float, scheduled: float | None, started: float | None) -> PodView:
    return PodView(
        name=f"p{index}", role="train", run="1-a", revision=1, index=index, created=after(created),
        scheduled_at=None if scheduled is None else after(scheduled),
        started=None if started is None else after(started),
    )  # fmt: skip


def reported(first_step: float, from_step: int = 0, **seconds: float) -> Startup:
    return Startup.model_validate(
        {"seconds": seconds, "fromStep": from_step, "firstStep": after(first_step).timestamp()}
    )


REPORT = reported(100.7, model=9.6, step=3.2)
MODEL = {"totalSeconds": 100, "modelSeconds": 10, "stepSeconds": 3}
MADE = {"prepareSeconds": 40}


@pytest.mark.parametrize(
    ("pods", "expected"),
    [
        (
            [pod(0, 41, 43, 60), pod(1, 42, 50, 55)],
            {"queueSeconds": 2, "scheduleSeconds": 8, "pullSeconds": 10},
        ),
        (  # replaced: the newest pod of the rank counts
            [pod(0, 41, 43, 60), pod(1, 42, 50, 55), pod(1, 70, 72, 75)],
            {"queueSeconds": 30, "scheduleSeconds": 2, "pullSeconds": 3},
        ),
        (  # its replacement has not started, so it has run no step
            [pod(0, 41, 43, 60), pod(1, 42, 50, 55), pod(1, 99, None, None)],
            {"queueSeconds": 2, "scheduleSeconds": 8, "pullSeconds": 10},
        ),
        ([pod(0, 41, 43, 60), pod(1, 42, None, 55)], {"queueSeconds": 2}),
        ([pod(0, 41, 43, 60)], {}),
    ],
    ids=["the last pod", "replaced", "being replaced", "scheduling not observed", "gone"],
)
def test_parts_are_those_of_the_gangs_last_pod(
    pods: list[PodView], expected: dict[str, int]
) -> None:
    found = startup(T0, 2, JOB, pods, REPORT)
    assert found is not None and found.to_json() == MODEL | MADE | expected
    if "pullSeconds" in expected:
        before = sum(expected.values()) + MADE["prepareSeconds"]
        assert after(before) == max(p.started for p in pods if p.started), "no second is lost"


@pytest.mark.parametrize(
    ("began", "report"),
    [(None, REPORT), (T0, None), (T0, reported(100, from_step=7, step=1.0))],
    ids=["waits for its model", "no step yet", "resumed from a checkpoint"],
)
def test_no_startup_times_without_the_runs_first_step(began: Any, report: Startup | None) -> None:
    assert startup(began, 1, JOB, [pod(0, 41, 43, 60)], report) is None


def test_clock_skew_makes_no_negative_times() -> None:
    found = startup(after(200), 1, JOB, [], REPORT)
    assert found is not None and (found.total_seconds, found.prepare_seconds) == (0, 0)


def test_startup_times_are_written_once_per_run() -> None:
    world = at_training()
    world.report("Loading")
    world.settle()
    assert "startup" not in world.status
    world.wait(20)
    raw = reported(30, launch=2.0, model=12.0, step=1.0).to_json()
    world.report(startup=raw)
    world.settle()
    expected = {
        "totalSeconds": 30, "prepareSeconds": 0, "queueSeconds": 5, "scheduleSeconds": 0,
        "pullSeconds": 0, "launchSeconds": 2, "modelSeconds": 12, "stepSeconds": 1,
    }  # fmt: skip
    assert world.status["startup"] == expected
    world.report(attempt=2, restarts=1, startup=reported(900, step=1.0).to_json())
    world.settle()
    assert world.status["startup"] == expected
    world.edit(rerunToken="again")
    world.settle()
    assert "startup" not in world.status, "the next run has its own startup times"


def test_startup_times_from_the_termination_message_of_an_unpolled_gang() -> None:
    world = at_training()
    world.wait(60)
    world.finish("train", trained=TRAINED | {"startup": reported(33, step=1.0).to_json()})
    world.settle()
    assert world.status["startup"]["totalSeconds"] == 33
    assert world.status["startup"]["queueSeconds"] == 5


def test_startup_times_include_the_queue() -> None:
    world = World(scheduling={"queueName": "gpus"})
    world.settle()
    world.wait(10)
    world.finish("prepare", prepared=PREPARED)
    world.settle()
    world.wait(600)
    world.child("train")["spec"]["suspend"] = False
    train(world)
    world.report(startup=reported(640, step=1.0).to_json())
    world.settle()
    found = world.status["startup"]
    assert (found["prepareSeconds"], found["queueSeconds"], found["totalSeconds"]) == (10, 605, 640)


def test_runs_are_counted_once_by_part() -> None:
    metrics = Metrics(Store(), lambda: 0)
    run = {"run": {"id": "1-a"}}
    full = run | {"startup": {"totalSeconds": 60, "pullSeconds": 12}}
    for before, now in (({}, run), (run, full), (full, full), (full, full | {"restarts": 1})):
        metrics.note(before, now)
    metrics.note(full, {"run": {"id": "2-a"}, "startup": {"totalSeconds": 40}})
    page = generate_latest(metrics.registry).decode()
    assert 'finetune_operator_startup_seconds_sum{part="total"} 100.0' in page
    assert 'finetune_operator_startup_seconds_count{part="total"} 2.0' in page
    assert 'finetune_operator_startup_seconds_sum{part="pull"} 12.0' in page
