"""GPU time by class: what pods held, divided by what the trainer reports."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_world import T0, TRAINED, at_training
from prometheus_client import generate_latest

from finetune_api.cluster import Compute
from finetune_api.results import Termination
from finetune_api.status import GpuSeconds, Usage
from finetune_api.time_use import TIME_CLASSES, TimeUse
from finetune_operator.metrics import Metrics
from finetune_operator.status.usage import Gang, usage
from finetune_operator.store import Store
from finetune_operator.world.pods import PodView

CLASSES = tuple(GpuSeconds.model_fields)


def at(seconds: float) -> datetime:
    return T0 + timedelta(seconds=seconds)


def pod(
    index: int, scheduled: float, started: float | None = None, ended: float | None = None,
    *, gpus: int = 4, suffix: str = "x", **more: Any,
) -> PodView:  # fmt: skip
    phase = "Failed" if ended is not None else "Running"
    return PodView(
        name=f"{index}-{suffix}", role="train", run="1-a", revision=1, index=index,
        created=at(scheduled), scheduled=True, scheduled_at=at(scheduled), phase=phase, job="j",
        started=None if started is None else at(started),
        finished=None if ended is None else at(ended),
        limits={"nvidia.com/gpu": str(gpus)}, **more,
    )  # fmt: skip


def told(
    began: float, until: float, *, attempt: int = 1, uncommitted: float = 0.0,
    progressed: float | None = None, processes: int = 8, **seconds: float,
) -> TimeUse:  # fmt: skip
    """A report; seconds by class are wall-clock seconds of the gang."""
    start = T0.timestamp()
    return TimeUse.model_validate(
        {
            "attempt": attempt, "processes": processes, "began": start + began,
            "until": start + until, "progressed": start + (until if progressed is None else
            progressed), "uncommitted": uncommitted * processes,
            "seconds": {name: spent * processes for name, spent in seconds.items()},
        }
    )  # fmt: skip


def spent(
    pods: Sequence[PodView], report: TimeUse | None, now: float, *, before: Usage | None = None,
    gone: Sequence[PodView] = (), over: bool = False, done: bool = False, ended: bool = False,
) -> Usage:  # fmt: skip
    compute = Compute(nodes=2, gpusPerNode=4)
    gang = Gang(compute, pods, gone, at(0), waits=not (ended or done))
    return usage(before or Usage(), gang, report, over=over, done=done, ended=ended, now=at(now))


def by_class(found: Usage) -> dict[str, int]:
    assert found.gpu_seconds == sum(value for _, value in found.gpu_seconds_by_class)
    return {name: value for name, value in found.gpu_seconds_by_class if value}


WHOLE = [pod(0, 10, 20), pod(1, 15, 30)]
"""Two pods: 0 waits for 1 from second 20 to 30."""

CASES: list[tuple[str, dict[str, Any], dict[str, int]]] = [
    ("no pod yet", {"pods": [], "report": None, "now": 100}, {}),
    ("pulling", {"pods": [pod(0, 10)], "report": None, "now": 95}, {"pull": 80 * 4}),
    (
        "no report yet",
        {"pods": WHOLE, "report": None, "now": 95},
        {"pull": 10 * 4 + 15 * 4, "idle": 10 * 4, "unsettled": 60 * 8},
    ),
    (
        # What no report explains, from the start of the last pod to the processes', is load.
        "training",
        {
            "pods": WHOLE, "now": 205,
            "report": told(40, 200, launch=20, load=50, evaluation=10, productive=80,
                           uncommitted=20),
        },
        {"pull": 100, "idle": 40, "load": 60 * 8, "evaluation": 80, "productive": 640,
         "unsettled": 160},
    ),
    (
        "a pod ended, and the gang waits for the next",
        {
            "pods": [WHOLE[0], pod(1, 15, 30, 150)], "now": 215,
            "report": told(40, 150, load=50, productive=40, uncommitted=20),
        },
        {"pull": 100, "idle": 40 + 0, "load": 60 * 8, "productive": 320, "unsettled": 160},
    ),
    (
        "the run has failed: what no checkpoint has is lost",
        {
            "pods": [pod(0, 10, 20, 155), pod(1, 15, 30, 155)], "now": 300, "ended": True,
            "report": told(40, 150, load=50, productive=40, uncommitted=20),
        },
        {"pull": 100, "idle": 40, "load": 60 * 8, "productive": 320, "recomputed": 25 * 8},
    ),
    (
        "its final report tells what it did to the end",
        {
            "pods": [pod(0, 10, 20, 155), pod(1, 15, 30, 155)], "now": 300, "ended": True,
            "over": True, "report": told(40, 150, load=50, productive=40, uncommitted=20),
        },
        {"pull": 100, "idle": 40, "load": 60 * 8, "productive": 320, "recomputed": 160,
         "teardown": 40},
    ),
    (
        "it has failed by a stall",
        {
            "pods": [pod(0, 10, 20, 1050), pod(1, 15, 30, 1050)], "now": 1300, "ended": True,
            "report": told(40, 1050, load=50, productive=40, uncommitted=920, progressed=150),
        },
        {"pull": 100, "idle": 40, "load": 60 * 8, "productive": 320, "recomputed": 20 * 8,
         "hang": 900 * 8},
    ),
    (
        "nothing was ever reported",
        {"pods": [pod(0, 10, 20, 90), pod(1, 15, 30, 90)], "report": None, "now": 99,
         "ended": True},
        {"pull": 100, "idle": 40, "load": 480},
    ),
    (
        "done",
        {
            "pods": [pod(0, 10, 20, 205), pod(1, 15, 30, 210)], "now": 300, "done": True,
            "report": told(40, 200, load=50, productive=80, evaluation=30),
        },
        {"pull": 100, "idle": 40, "load": 60 * 8, "productive": 640, "evaluation": 240,
         "teardown": 5 * 4 + 10 * 4},
    ),
    (
        "a node is lost: the other pod waits from when it was not reachable",
        {
            "pods": [
                WHOLE[0],
                pod(1, 15, 30, disruption="DeletionByTaintManager", ready=False,
                    ready_changed=at(100), disrupted_at=at(130), deleted_by=at(160)),
            ],
            "report": None, "now": 155,
        },
        {"pull": 100, "idle": 40 + 50 * 8, "unsettled": 70 * 8},
    ),
    (
        # Up to the time without any pod: an operator that was away may not have seen pods.
        "more was reported than the pods held",
        {"pods": WHOLE, "now": 205, "report": told(40, 200, productive=1e6, hang=1e6)},
        {"pull": 100, "idle": 40, "productive": 680 + 40, "hang": 680 + 40},
    ),
    (
        "an elastic gang works with one of two pods",
        {"pods": [WHOLE[0]], "now": 205, "report": told(40, 200, processes=4, productive=160)},
        {"pull": 40, "idle": 20 * 4, "productive": 160 * 4},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("given_", "expected"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_classes(given_: dict[str, Any], expected: dict[str, int]) -> None:
    assert by_class(spent(**given_)) == expected


def test_a_restart_settles_what_the_killed_attempt_did() -> None:
    """Pod 1 is killed at 150, replaced at 170, and runs at 180; training goes on at 190."""
    first = spent(WHOLE, told(40, 148, load=50, productive=40, uncommitted=18), 153)
    pods = [WHOLE[0], pod(1, 15, 30, 150), pod(1, 170, 180, suffix="y")]
    between = spent(pods, told(40, 148, load=50, productive=40, uncommitted=18), 186, before=first)
    assert by_class(between)["idle"] == 40 + 30 * 4
    report = told(190, 240, attempt=2, load=70, productive=60, recomputed=20, uncommitted=10)
    after = by_class(spent(pods, report, 245, before=between))
    assert after == {
        "pull": 100 + 10 * 4, "idle": 40 + 30 * 4,
        "load": 8 * (10 + 70 + 10), "productive": 8 * 60, "recomputed": 8 * 20, "unsettled": 8 * 10,
    }  # fmt: skip


def test_queued_seconds_are_those_without_any_pod() -> None:
    waiting = spent([], None, 100)
    assert (waiting.queued_seconds, waiting.gpu_seconds) == (90, 0)
    found = spent([pod(0, 97, 99), pod(1, 97, 99)], None, 245, before=waiting)
    assert found.queued_seconds == 97
    assert found.gpu_seconds == 8 * (240 - 97)


def test_pods_that_no_operator_saw_are_charged_as_the_trainer_reports_them() -> None:
    before = spent([], None, 65)
    report = told(500, 560, attempt=2, load=40, productive=300)
    found = spent([pod(0, 490, 495), pod(1, 490, 495)], report, 565, before=before)
    assert by_class(found)["productive"] == 8 * 300
    assert found.queued_seconds == 490 - 275, "what attempt 1 took"
    assert found.gpu_seconds == 8 * (275 + 70)


TIMES = st.integers(min_value=0, max_value=400)


@st.composite
def pods_of(draw: st.DrawFn) -> PodView:
    scheduled, *later = sorted(draw(st.lists(TIMES, min_size=3, max_size=3)))
    shown = draw(st.integers(min_value=0, max_value=2))
    times = [*later[:shown], None, None]
    index, suffix = draw(st.integers(0, 1)), draw(st.text("abc", min_size=1, max_size=3))
    return pod(index, scheduled, times[0], times[1], gpus=draw(st.integers(0, 8)), suffix=suffix)


REPORTS = st.builds(
    lambda times, seconds, uncommitted, attempt: told(
        times[0], times[1], uncommitted=uncommitted, attempt=attempt, **seconds
    ),
    st.lists(TIMES, min_size=2, max_size=2).map(sorted),
    st.dictionaries(st.sampled_from(TIME_CLASSES), st.floats(0, 500), max_size=6),
    st.floats(0, 500), st.integers(1, 3),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    st.lists(pods_of(), max_size=5),
    st.lists(st.tuples(st.integers(1, 120), st.none() | REPORTS, st.booleans()), max_size=6),
    st.booleans(),
)
def test_classes_are_exclusive_and_only_grow(
    pods: list[PodView], passes: list[tuple[int, TimeUse | None, bool]], ended: bool
) -> None:
    """Over any reports, and operators that start again from status, no class falls, and the classes
    add up to what the pods held."""
    now, found = 0, Usage()
    for seconds, report, late in passes:
        now += seconds
        before = found
        found = spent(pods, report, now, before=before)
        for name in CLASSES:
            value = getattr(found.gpu_seconds_by_class, name)
            assert value >= 0
            if name != "unsettled":
                assert value >= getattr(before.gpu_seconds_by_class, name)
        assert found.gpu_seconds >= before.gpu_seconds
        if late:  # the status write failed, and the next pass starts from the older one
            found = before
    until = now + 500
    last = spent(pods, None, until, before=found, ended=ended)
    seen = last.until and datetime.fromisoformat(last.until)
    held = sum(
        int(p.limits["nvidia.com/gpu"]) * max(0, (min(p.finished or seen, seen) - begin(p)).days
        * 86400 + (min(p.finished or seen, seen) - begin(p)).seconds)
        for p in pods if seen and begin(p) < seen
    )  # fmt: skip
    unseen = 8 * 400  # a report may tell of pods that no operator saw
    assert held <= last.gpu_seconds <= held + unseen
    if not any(report for _, report, _ in passes):
        assert last.gpu_seconds == held


def begin(view: PodView) -> datetime:
    assert view.scheduled_at is not None
    return view.scheduled_at


def test_status_and_metrics_show_the_classes() -> None:
    world = at_training(compute={"nodes": 2, "gpusPerNode": 4})
    world.wait(100)
    began = 5.0
    report = told(began, 105, load=30, productive=50, uncommitted=20)
    world.report(time=report.to_json(), step=3)
    world.settle()
    world.wait(60)
    done = told(began, 165, load=30, productive=100, evaluation=20, checkpoint=10)
    world.finish("train", trained={**TRAINED, "time": done.to_json()})
    before = dict(world.status)
    world.settle()
    found = world.status["usage"]
    assert found["gpuSeconds"] == 160 * 8
    spent_on = {k: v for k, v in found["gpuSecondsByClass"].items() if v}
    assert spent_on == {"load": 240, "productive": 800, "evaluation": 160, "checkpoint": 80}
    assert (found["goodput"], found["queuedSeconds"]) == ("0.625", 5)
    metrics = Metrics(Store(), lambda: 0)
    metrics.note({"run": before["run"]}, before)
    metrics.note(before, world.status)
    page = generate_latest(metrics.registry).decode()
    assert 'finetune_operator_gpu_seconds_total{class="productive"} 800.0' in page
    assert 'finetune_operator_gpu_seconds_total{class="hang"} 0.0' in page
    assert "unsettled" not in page


def test_the_final_report_of_a_suspended_run_settles_its_time() -> None:
    world = at_training(compute={"nodes": 2, "gpusPerNode": 4})
    world.wait(100)
    world.report(time=told(5, 105, load=30, productive=50, uncommitted=20).to_json(), step=3)
    world.settle()
    job = world.child("train")
    world.edit(suspend=True)
    world.settle()
    world.wait(10)
    last = told(5, 113, load=30, productive=75, checkpoint=3)
    said = Termination.model_validate({"run": world.run["id"], "role": "train", "time": last})
    ended = {"exitCode": 23, "message": said.to_text()}
    world.gone = [world.pod(job, index, terminated=dict(ended)) for index in (0, 1)]
    world.remove_pods()
    world.settle()
    spent_on = {k: v for k, v in world.status["usage"]["gpuSecondsByClass"].items() if v}
    assert spent_on == {"load": 240, "productive": 600, "checkpoint": 24, "teardown": 16}
    before = world.status["usage"]
    world.wait(600)
    world.edit(suspend=False)
    world.pass_()
    assert world.status["usage"] == before, "a pause costs nothing"
