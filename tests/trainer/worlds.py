"""Process groups for tests: real processes with gloo, forked from a server that has imported torch.

Importing takes ten times as long as training a tiny model; the fork server pays it once.
"""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.forkserver
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from ports import free_port

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["finetune_trainer.train.worker", "worlds", "gradient_worker", "classify_worker",
     "loading_worker", "checkpoint_worker", "sharding_worker", "muon_worker", "world_caches"]
)  # fmt: skip


def start_fork_server() -> None:
    """Start the fork server with the modules of ``set_forkserver_preload``. A process has only one
    fork server, started by its first use; if prepare's pool were first, it would preload no torch.
    """
    multiprocessing.forkserver.ensure_running()


def forked(target: Callable[..., None], *arguments: object) -> BaseProcess:
    """Start a process that runs a function of an importable module; return it."""
    process = _context.Process(target=_begin, args=(target, *arguments), daemon=True)
    process.start()
    return process


def _begin(target: Callable[..., None], *arguments: object) -> None:
    gc.freeze()  # as the trainer's processes do: the server's objects live to the end
    target(*arguments)


def _work(environment: dict[str, str], log: str, before: Callable[[], None] | None) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with Path(log).open("ab", buffering=0) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    import torch

    torch.set_num_threads(1)
    from finetune_trainer.train import worker as train_worker

    if before is not None:
        before()
    code = train_worker.main()
    sys.stdout.flush()
    os._exit(code)


@dataclass
class RunningWorld:
    """Worker processes of one attempt."""

    processes: list[BaseProcess]
    folder: Path
    log: Path
    metrics_port: int

    def send_stop(self, *ranks: int) -> None:
        """Request a stop, as the supervisors of these ranks do after SIGTERM."""
        for rank in ranks:
            worker_folder(self.folder, rank).mkdir(exist_ok=True)
            (worker_folder(self.folder, rank) / "stop").touch()

    def wait(self, seconds: float = 300) -> list[int]:
        """Wait for all workers; return their exit codes by rank."""
        for process in self.processes:
            process.join(seconds)
        codes = [p.exitcode for p in self.processes]
        if None in codes:
            self.kill()
            raise TimeoutError(f"workers still ran after {seconds} s: {self.log.read_text()}")
        return [int(c) for c in codes if c is not None]

    def wait_for_log(self, text: str, seconds: float = 300) -> None:
        """Wait until the workers' log has a text; fail if a worker ends before.

        The log is made by the first worker, after the world has started."""
        deadline = time.monotonic() + seconds
        while text not in (log := self.log.read_text() if self.log.exists() else ""):
            assert time.monotonic() < deadline, f"{text!r} was not logged: {log}"
            assert all(p.is_alive() for p in self.processes), log
            time.sleep(0.02)

    def kill(self) -> None:
        """Kill all workers, like a lost node: nothing is reported or saved."""
        for process in self.processes:
            process.kill()
            process.join()


def worker_folder(folder: Path, rank: int) -> Path:
    """Return the folder of a rank's worker files. Each rank acts as a node."""
    return folder / f"worker-{rank}"


def start_world(
    environment: Mapping[str, str], size: int, folder: Path,
    before: Callable[[], None] | None = None,
) -> RunningWorld:  # fmt: skip
    """Start the workers of an attempt; ``environment`` has the run spec's path and the credentials.
    ``before`` (a function of an importable module) is called first in each, to inject faults."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    metrics = free_port()
    log = folder / "log"
    processes: list[BaseProcess] = []
    for rank in range(size):
        variables = dict(environment) | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "FINETUNE_WORKER_FILES": str(worker_folder(folder, rank)),
            "FINETUNE_METRICS_PORT": str(metrics),
            "FINETUNE_SCRATCH": str(folder / "scratch"), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        processes.append(forked(_work, variables, str(log), before))
    return RunningWorld(processes, folder, log, metrics)
