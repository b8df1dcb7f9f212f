"""Supervisors on loopback, each as one node of a gang."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.results import Termination
from finetune_api.run_spec import CONTRACT_VERSION, JobIdentity, RunSpec
from finetune_api.spec import parse_spec
from finetune_trainer.supervise.processes import descendants
from ports import free_port

MAIN = (
    "import sys; from finetune_trainer.supervise.supervisor import supervise;"
    " sys.exit(supervise('worker'))"
)
FRAME = re.compile(r"frame #\d+: |Exception raised from ")


class Nodes:
    """Starts supervisors, each in its own folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shared = folder / "shared"
        self.shared.mkdir()
        self.port = free_port()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.write_run_spec()

    def write_run_spec(self, **spec: Any) -> None:
        run_spec = RunSpec(
            version=CONTRACT_VERSION,
            job=JobIdentity(namespace="default", name="job", uid="abcde"),
            run="1-abcde",
            spec=parse_spec(
                {
                    "model": {"source": "s3://bucket/model"},
                    "data": {"train": [{"source": "s3://bucket/train.jsonl"}]},
                    "output": {"destination": "s3://bucket/out"},
                    **spec,
                }
            ),
        )
        (self.folder / "run-spec.json").write_text(run_spec.to_text())

    def start(
        self, worker: str, rank: int = 0, main: str = MAIN, **environment: Any
    ) -> subprocess.Popen[bytes]:
        place = self.folder / f"node-{rank}"
        place.mkdir(exist_ok=True)
        (place / "worker.py").write_text(worker)
        own = {
            "PYTHONPATH": os.pathsep.join([str(place), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": 1,
            "SHARED": self.shared,
            "FINETUNE_RUN_SPEC": self.folder / "run-spec.json",
            "FINETUNE_SCRATCH": place / "scratch",
            "FINETUNE_TERMINATION": place / "termination" / "message",
            "FINETUNE_NODE_RANK": rank,
            "FINETUNE_RENDEZVOUS": f"127.0.0.1:{self.port}",
            "FINETUNE_GRACE_SECONDS": 30,
            **environment,
        }
        with (place / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", main],
                env={**os.environ, **{key: str(value) for key, value in own.items()}},
                stdout=log,
                stderr=log,
            )
        self.processes.append(process)
        return process

    def wait_for(self, pattern: str, count: int = 1, seconds: float = 300) -> list[Path]:
        """Wait until the workers have written ``count`` files; return them."""
        deadline = time.monotonic() + seconds
        while len(found := sorted(self.shared.glob(pattern))) < count:
            assert time.monotonic() < deadline, f"{pattern}: {found}\n{self.logs()}"
            time.sleep(0.02)
        return found

    def wait_for_log(self, words: str, rank: int = 0) -> None:
        deadline = time.monotonic() + 300
        while words not in (self.folder / f"node-{rank}/log").read_text():
            assert time.monotonic() < deadline, f"{words!r} is not in\n{self.logs()}"
            time.sleep(0.02)

    def logs(self) -> str:
        """Return the end of each node's log, without torch's stacks of C++ functions."""
        texts = []
        for path in sorted(self.folder.glob("node-*/log")):
            lines = [line for line in path.read_text().splitlines() if not FRAME.search(line)]
            texts.append(f"{path.parent.name}: " + "\n".join(lines)[-4000:])
        return "\n".join(texts)

    def end(self, process: subprocess.Popen[bytes], seconds: float = 300) -> int:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.logs()) from None

    def termination(self, rank: int = 0) -> Termination:
        text = (self.folder / f"node-{rank}/termination/message").read_text()
        return Termination.model_validate(json.loads(text))

    def kill_node(self, process: subprocess.Popen[bytes]) -> None:
        """Simulate a lost node: kill all its processes without warning."""
        for pid in [process.pid, *descendants(process.pid)]:
            os.kill(pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    """Nodes that are killed at the end of the test."""
    made = Nodes(tmp_path)
    yield made
    for process in made.processes:
        if process.poll() is None:
            made.kill_node(process)
