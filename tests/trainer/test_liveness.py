"""Stalled processes: the limit, the signs of progress, and a gang whose rank is stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from bench import Bench
from worlds import worker_folder

from finetune_trainer import liveness
from finetune_trainer.liveness import StallWatch, progressed, stall_limit
from finetune_trainer.train import checkpoint

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("asked", "longest", "started", "limit", "stopping"),
    [
        (None, 0.0, False, 3600, 60), (None, 0.0, True, 900, 60), (None, 10.0, True, 900, 60),
        (None, 120.0, True, 2400, 360), (None, 300.0, False, 6000, 900), (75, 300.0, True, 75, 75),
        (75, 0.0, False, 75, 60),
    ],
)  # fmt: skip
def test_limit(
    asked: float | None, longest: float, started: bool, limit: float, stopping: float
) -> None:
    assert stall_limit(asked, longest, started) == limit
    assert stall_limit(asked, longest, started, stopping=True) == stopping


def test_a_process_that_is_requested_to_stop_waits_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "STOPPING_SECONDS", 0.5)
    monkeypatch.setattr(liveness, "_LOOK_SECONDS", 0.1)
    stalled, stop = threading.Event(), threading.Event()
    with StallWatch(60, tmp_path / "stacks", lambda idle, _: stalled.set(), stop.is_set):
        assert not stalled.wait(1.5)
        stop.set()
        assert stalled.wait(30)


def test_a_process_with_signs_of_progress_has_not_stalled(tmp_path: Path) -> None:
    stalled: list[float] = []
    with StallWatch(0.5, tmp_path / "stacks", lambda idle, _: stalled.append(idle)):
        for _ in range(20):
            time.sleep(0.1)
            progressed()
        assert not stalled
        deadline = time.monotonic() + 30
        while not stalled and time.monotonic() < deadline:
            time.sleep(0.05)
    assert stalled and stalled[0] >= 0.5
    assert "test_a_process_with_signs_of_progress" in (tmp_path / "stacks").read_text()


def test_a_process_that_was_stopped_as_a_whole_has_not_stalled(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from finetune_trainer.liveness import StallWatch, progressed
with StallWatch(4, Path(sys.argv[1]), lambda idle, path: print("stalled", flush=True)):
    print("ready", flush=True)
    for _ in range(60):
        time.sleep(0.1)
        progressed()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "stacks")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(6)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=60)[0] == ""
    assert process.returncode == 0


def test_a_checkpoint_whose_upload_hangs_has_stalled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a rank that has sent its part and waits for those of a stopped rank."""
    monkeypatch.setattr(checkpoint, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(checkpoint, "UPLOAD_SECONDS", 2.0)
    stalled, hangs = threading.Event(), threading.Event()
    with StallWatch(0.5, tmp_path / "stacks", lambda idle, _: stalled.set()):
        upload = checkpoint.Upload(1, lambda: bool(hangs.wait(60)) and None, time.monotonic())
        threading.Thread(target=upload.wait, daemon=True).start()
        assert not stalled.wait(1), "a slow upload is none"
        assert stalled.wait(30)
    hangs.set()


def soon() -> None:
    """Called in each worker: processes have stalled after 5 seconds."""
    liveness.START_SECONDS = 60.0  # type: ignore[misc]
    liveness.LEAST_SECONDS = 5.0  # type: ignore[misc]
    liveness.TIMES_LONGEST = 2  # type: ignore[misc]


def test_a_stopped_rank_ends_the_others_with_their_stacks_in_storage(bench: Bench) -> None:
    run_spec = bench.run_spec(
        "1-stall", training={"maxSteps": 100_000, "epochs": None},
        evaluation={"everySteps": 100_000},
    )  # fmt: skip
    world = bench.start(run_spec, 2, "stalled", soon)
    world.wait_for_log("step")
    frozen = world.processes[1].pid
    assert frozen is not None
    os.kill(frozen, signal.SIGSTOP)
    world.processes[0].join(90)
    assert world.processes[0].exitcode == 24, world.log.read_text()
    world.kill()
    failure = (worker_folder(world.folder, 0) / "failure-0.json").read_text()
    assert "rank 0 made no progress for" in failure and '"Stalled"' in failure
    stacks = bench.store.get(f"{run_spec.run_uri}/stacks/attempt-1-rank-0.txt").decode()
    assert "optimizer_step" in stacks or "exchange" in stacks or "take_steps" in stacks
    assert "With native frames:" in stacks and "no native stacks" not in stacks, stacks
    uri = f"{run_spec.run_uri}/stacks/attempt-1-rank-0-collectives.json"
    collectives = json.loads(bench.store.get(uri))
    assert collectives["entries"][-1]["profiling_name"].startswith("gloo:")
    assert collectives["pg_status"]
    result = bench.head(run_spec)
    assert result is not None and result.attempt == 1
