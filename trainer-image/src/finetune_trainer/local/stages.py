"""Stages as local processes, one for each pod of a cluster.

A process gets its run spec, folders and rank only from the environment, as a container does. Its
output goes to a log file, its termination message to a file.
"""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from finetune_api.names import (
    ENV_GRACE_SECONDS,
    ENV_METRICS_PORT,
    ENV_NODE_RANK,
    ENV_NODES,
    ENV_PROCESSES,
    ENV_PVC_ROOT,
    ENV_RENDEZVOUS,
    ENV_RUN_SPEC,
    ENV_SCRATCH,
    ENV_TERMINATION,
    FINAL_EXIT_CODES,
    ExitCode,
)
from finetune_api.results import Failure, Progress, Termination
from finetune_trainer.failures import TrainerError, exit_code, failure_of
from finetune_trainer.local.layout import Layout
from finetune_trainer.storage.s3server import free_ports
from finetune_trainer.threads import thread_environment

GRACE_SECONDS: Final = 120
"""Seconds that training has to save its state when it is stopped."""
COMMANDS: Final = {"prepare": "prepare", "train": "supervise", "publish": "publish"}


@dataclass(frozen=True)
class StagePaths:
    """Folders, keys and cores that all processes of a run share."""

    folder: Path
    """The run's folder: run-spec.json, logs, scratch."""
    claims: Path
    storage: Mapping[str, str]
    """Access keys, as environment variables."""
    cores: int


class StageProcess:
    """One process of a stage, in place of a container."""

    def __init__(
        self, paths: StagePaths, role: str, rank: int, extra: Mapping[str, str], processes: int = 1
    ) -> None:
        """
        Args:
            processes: processes of the whole stage, which share the cores.
        """
        self.role = role
        name = f"{role}-{rank}" if role == "train" else role
        self.log = paths.folder / f"{name}.log"
        self.scratch = paths.folder / "scratch" / name
        self._termination = paths.folder / "termination" / f"{name}.json"
        self._environment = {
            **os.environ,
            **thread_environment(os.environ, processes, paths.cores, adaptive=role == "train"),
            **paths.storage,
            "PYTHONUNBUFFERED": "1",
            "TOKENIZERS_PARALLELISM": "true",
            ENV_RUN_SPEC: str(paths.folder / "run-spec.json"),
            ENV_SCRATCH: str(self.scratch),
            ENV_TERMINATION: str(self._termination),
            ENV_PVC_ROOT: str(paths.claims),
            **extra,
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start or restart the process; the log is appended to."""
        self._termination.unlink(missing_ok=True)
        self.scratch.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "finetune_trainer", COMMANDS[self.role]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,  # Ctrl-C reaches only `finetune run`, which sends SIGTERM
            )

    @property
    def exit_code(self) -> int | None:
        """None while the process runs."""
        return None if self._process is None else self._process.poll()

    def send(self, number: signal.Signals) -> None:
        """Signal the process if it runs; SIGKILL goes to its whole process group."""
        if self._process is None or self._process.poll() is not None:
            return
        if number == signal.SIGKILL:
            os.killpg(self._process.pid, number)
        else:
            self._process.send_signal(number)

    def wait(self) -> None:
        if self._process is not None:
            self._process.wait()

    def said(self) -> Termination | None:
        """Return the termination message, or None if there is none."""
        try:
            return Termination.model_validate_json(self._termination.read_text())
        except FileNotFoundError:
            return None

    def failure(self) -> Failure:
        """Return why the process failed."""
        said = self.said()
        if said is not None and said.failure is not None:
            return said.failure
        ended = f"exit code {self.exit_code}"
        if self.exit_code is not None and self.exit_code < 0:
            ended = f"signal {signal.Signals(-self.exit_code).name}"
        words = f"{self.role} ended with {ended} and left no termination message; see {self.log}"
        return failure_of(TrainerError("NoTerminationMessage", words))


_FINAL_HERE: Final = (ExitCode.UNEXPECTED, ExitCode.HOST_OUT_OF_MEMORY)
"""Retried in a cluster: another node may do better."""


class Stage:
    """The processes of one role."""

    def __init__(self, processes: list[StageProcess], max_restarts: int) -> None:
        self.processes = processes
        self.restarts = 0
        self._max_restarts = max_restarts
        self._stopping = False

    def start(self) -> None:
        for process in self.processes:
            process.start()

    def step(self) -> bool:
        """Restart the process of a lost node, as a cluster does; return whether all have ended."""
        codes = [process.exit_code for process in self.processes]
        if not self._stopping:
            for process, code in zip(self.processes, codes, strict=True):
                if code in (None, ExitCode.OK):
                    continue
                final = code in FINAL_EXIT_CODES or code in _FINAL_HERE
                if final or self.restarts >= self._max_restarts:
                    self.stop()
                    break
                self.restarts += 1
                process.start()
        return all(process.exit_code is not None for process in self.processes)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Signal all processes to save and exit; nothing is restarted."""
        self._stopping = True
        for process in self.processes:
            process.send(number)

    def failed(self) -> tuple[StageProcess, Failure] | None:
        """Return the process whose failure explains the stage's best: a final failure before a
        retryable one, preempted processes last."""
        bad = [p for p in self.processes if p.exit_code not in (None, ExitCode.OK)]
        if not bad:
            return None
        told = [(process, process.failure()) for process in bad]

        def rank(item: tuple[StageProcess, Failure]) -> int:
            _, failure = item
            if int(exit_code(failure)) in FINAL_EXIT_CODES:
                return 0
            return 2 if failure.failure_class == "Preempted" else 1

        return min(told, key=rank)


def single_process_stage(paths: StagePaths, role: str) -> Stage:
    """Return the prepare or publish stage: one process on all cores. Prepare has its own process
    pool, so ``prepare.workers`` would add nothing on one machine."""
    return Stage([StageProcess(paths, role, 0, {})], max_restarts=0)


def training_stage(paths: StagePaths, layout: Layout, max_restarts: int) -> tuple[Stage, int]:
    """Return the training stage (one supervisor per node) and the port of its progress."""
    rendezvous, *metrics = free_ports(1 + layout.nodes)
    processes = []
    for rank in range(layout.nodes):
        extra = {
            ENV_NODES: str(layout.nodes),
            ENV_NODE_RANK: str(rank),
            ENV_PROCESSES: str(layout.processes),
            ENV_RENDEZVOUS: f"127.0.0.1:{rendezvous}",
            ENV_METRICS_PORT: str(metrics[rank]),
            ENV_GRACE_SECONDS: str(GRACE_SECONDS),
        }
        if layout.gpus[rank]:
            extra["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, layout.gpus[rank]))
        share = layout.nodes * layout.processes
        processes.append(StageProcess(paths, "train", rank, extra, share))
    return Stage(processes, max_restarts), metrics[0]


def read_progress(port: int, run: str) -> Progress | None:
    """Return the progress that rank 0 serves, or None while it serves none."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/progress", timeout=2) as answer:
            progress = Progress.model_validate_json(answer.read())
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError):
        return None  # not there yet, or killed while it answered
    return progress if progress.run == run else None
