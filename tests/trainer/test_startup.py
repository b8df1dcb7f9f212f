"""Startup time: contiguous parts from the launch by the supervisor to the end of the first step."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from finetune_api.results import Startup, TrainSummary
from finetune_trainer.local.display import trained_text
from finetune_trainer.supervise.processes import machine_time, started_at
from finetune_trainer.train.startup import StartupClock


def clock(launched: float | None, started: float | None, *times: float) -> StartupClock:
    ticks: Iterator[float] = iter(times)
    return StartupClock(launched, started, lambda: next(ticks))


def test_parts_are_contiguous_and_repeated_parts_are_summed() -> None:
    found = clock(10.0, 13.0, 20.0, 21.0, 25.0, 26.0, 30.0)
    for part in ("import", "data", "model", "data"):
        found.reached(part)
    startup = found.first_step(from_step=4, compiling=None)
    assert startup.seconds == {"launch": 3.0, "import": 7.0, "data": 2.0, "model": 4.0, "step": 4.0}
    assert list(startup.seconds) == ["launch", "import", "data", "model", "step"]
    assert (startup.total, startup.from_step) == (30.0 - 10.0, 4)
    assert startup.text == "20.0 s (launch 3.0, import 7.0, data 2.0, model 4.0, step 4.0)"


@pytest.mark.parametrize(
    ("launched", "started", "times", "expected"),
    [
        (None, 13.0, [20.0, 21.0], {"import": 7.0, "step": 1.0}),
        (10.0, None, [20.0, 20.0, 21.0], {"launch": 10.0, "import": 0.0, "step": 1.0}),
        (None, None, [20.0, 20.0, 21.0], {"import": 0.0, "step": 1.0}),
        # /proc counts in hundredths of a second.
        (10.0, 9.99, [20.0, 21.0], {"launch": 0.0, "import": 10.0, "step": 1.0}),
    ],
    ids=["no supervisor", "unknown start time", "neither", "within a tick"],
)
def test_parts_of_unknown_times_are_absent(
    launched: float | None, started: float | None, times: list[float], expected: dict[str, float]
) -> None:
    found = clock(launched, started, *times)
    found.reached("import")
    assert found.first_step(0, None).seconds == expected


@pytest.mark.parametrize(
    ("compiling", "expected"),
    [(0.0, {"compile": 0.0, "step": 5.0}), (3.0, {"compile": 3.0, "step": 2.0}),
     (6.0, {"compile": 5.0, "step": 0.0})],
)  # fmt: skip
def test_compiling_is_taken_out_of_the_first_step(
    compiling: float, expected: dict[str, float]
) -> None:
    found = clock(None, 10.0, 15.0, 15.0)
    assert found.first_step(0, compiling).seconds == expected


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels have no /proc")
def test_a_process_knows_when_it_was_started() -> None:
    program = (
        "from finetune_trainer.supervise.processes import machine_time, started_at;"
        "print(started_at(), machine_time())"
    )
    before = machine_time()
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    tick = 1 / os.sysconf("SC_CLK_TCK")
    own, started, told = started_at(), *map(float, said.stdout.split())
    assert own is not None and own < before <= started + tick
    assert started <= told <= machine_time()


def test_the_last_line_of_a_run_reports_the_startup_time() -> None:
    def text(startup: Startup | None) -> str:
        more: dict[str, Any] = {"loss": 0.5, "startup": startup}
        return trained_text(TrainSummary(attempt=1, restarts=0, steps=150, **more))

    startup = Startup(seconds={"import": 9.4, "step": 1.1}, from_step=0, first_step=1.0)
    assert text(startup) == "150 steps, first after 10s, loss 0.5000"
    assert text(None) == "150 steps, loss 0.5000"
