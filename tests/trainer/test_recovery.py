"""Recovery of a gang after the loss of a training process, with the real trainer."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from bench import Bench
from supervisors import Nodes

from finetune_api.run_spec import RunSpec
from finetune_trainer.storage.local_copies import FREE_SHARE
from finetune_trainer.supervise.processes import descendants
from ports import free_port
from variants import beyond

pytestmark = pytest.mark.slow
MAIN = "from finetune_trainer.supervise.supervisor import supervise; raise SystemExit(supervise())"


class Gang:
    """Supervisors of a run, as pods."""

    def __init__(self, nodes: Nodes, run_spec: RunSpec, size: int, processes: int) -> None:
        self.nodes, self.size, self.processes = nodes, size, processes
        self.metrics = free_port()
        (nodes.folder / "run-spec.json").write_text(run_spec.to_text())
        self.pods = [self.start(rank) for rank in range(size)]

    def start(self, rank: int) -> subprocess.Popen[bytes]:
        return self.nodes.start(
            "", rank, MAIN, FINETUNE_NODES=self.size, FINETUNE_PROCESSES_PER_NODE=self.processes,
            FINETUNE_METRICS_PORT=self.metrics,
        )  # fmt: skip

    def progress(self) -> dict[str, Any]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/progress") as page:
                found: dict[str, Any] = json.loads(page.read())
                return found
        except OSError:
            return {}

    def wait_for_step(self, attempt: int, step: int = 1) -> dict[str, Any]:
        """Wait until an attempt has done a step; return its progress."""
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            found = self.progress()
            if found.get("attempt") == attempt and found.get("startup") and found["step"] >= step:
                return found
            assert all(pod.poll() is None for pod in self.pods), self.nodes.logs()
            time.sleep(0.02)
        raise AssertionError(self.nodes.logs())

    def stop(self) -> None:
        for pod in self.pods:
            pod.send_signal(signal.SIGTERM)
        assert [pod.wait(300) for pod in self.pods] == [23] * self.size, self.nodes.logs()

    def pid_of(self, rank: int) -> int:
        for pod in self.pods:
            for pid in descendants(pod.pid):
                if Path(f"/proc/{pid}/comm").read_text() == f"rank-{rank}\n":
                    return pid
        raise AssertionError(f"no process of rank {rank}: {self.nodes.logs()}")


@pytest.mark.parametrize(("size", "processes"), beyond([(2, 1), (1, 2)], lambda size, _: size == 2))
def test_a_killed_rank_is_restarted_in_place(
    bench: Bench, nodes: Nodes, size: int, processes: int
) -> None:
    """No pod ends, and the workers resume from the last checkpoint."""
    run_spec = bench.run_spec(
        "1-killed", training={"maxSteps": 100_000, "epochs": None},
        evaluation={"everySteps": 100_000}, checkpoint={"everySteps": 5},
    )  # fmt: skip
    gang = Gang(nodes, run_spec, size, processes)
    print(f"{size} x {processes}, first start:", gang.wait_for_step(1, 10)["startup"])
    os.kill(gang.pid_of(1), signal.SIGKILL)
    began = time.monotonic()
    startup = gang.wait_for_step(2)["startup"]
    print(f"next step after {time.monotonic() - began:.1f} s:", startup)
    assert startup["fromStep"] >= 5
    logs = nodes.logs()
    assert "restarting the workers in place" in logs
    if size == 1:  # else rank 0 reads the adapter's part that the other node wrote
        disk = shutil.disk_usage(nodes.folder)
        full = disk.free < (FREE_SHARE + 0.01) * disk.total  # no copies are kept then
        assert full or "bytes from the nodes' own copies, 0 from storage" in logs
    gang.stop()
