"""The first process of a training pod: starts the gang's workers, and says how they ended.

    start ──► agent (torchrun) ──► workers ──► how did it end?
      ▲                                          │ done: the summary, exit 0
      └── only the peers were lost, or the ──────┤ own failure: verdict and exit code
          gang did not form                      └ SIGTERM: save within the grace period, exit 23

It imports neither torch nor transformers: it must stay small, and alive. A pod whose own worker
failed ends; a pod that only lost its peers starts its workers again in place and waits for the
replacement, so that one incident costs one pod.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Final

from finetune_api.names import ExitCode
from finetune_api.results import Termination
from finetune_trainer.failures import NodeFailure
from finetune_trainer.stage import (
    end_badly,
    end_with,
    leave_termination,
    load_run_spec,
    scratch_folder,
    start_log,
)
from finetune_trainer.supervise import agent, worker_files
from finetune_trainer.supervise.endings import Ended, judge, judge_stopped
from finetune_trainer.supervise.node_environment import NodeEnvironment, read_node_environment
from finetune_trainer.supervise.processes import (
    adopt_orphans,
    kill_descendants,
    machine_time,
    oom_kills,
)
from finetune_trainer.threads import thread_environment

log = logging.getLogger(__name__)

WORKER: Final = "finetune_trainer.train.worker"
FORM_SECONDS: Final = 1800
"""Least of the longest time without a gang; then the pod ends, and the next one may have better
luck. Where nodes may be waited for longer (scheduling.startDeadlineSeconds), so do those that have
theirs: the pod's end would count as an incident."""
CONNECT_SECONDS: Final = 60
"""One try to reach the rendezvous; then its name is looked up again."""
PAUSE_SECONDS: Final = 0.5
_ALLOCATION: Final = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
"""What torch reads its settings of GPU memory from, its newer and its older name."""
POLL_SECONDS: Final = 0.05
KILL_SECONDS: Final = 3
"""Of the grace period, kept for killing what is left and for the last word."""


def supervise(worker: str = WORKER) -> int:
    """Trains as one node of the gang and returns the container's exit code.

    It owns its process: signals are handled, and what runs below it at the end is killed.

    Args:
        worker: module that each training process runs.
    """
    start_log()
    run = ""
    try:
        run_spec = load_run_spec()
        run = run_spec.run
        node = read_node_environment(os.environ)
        patience = max(FORM_SECONDS, run_spec.spec.scheduling.start_deadline_seconds)
        return Supervisor(run, node, scratch_folder(), worker, patience).run_to_end()
    except Exception as error:
        return end_badly(run, "train", error)
    finally:
        kill_descendants()


class Supervisor:
    """One node's share of a gang, over all starts of its workers."""

    def __init__(
        self, run: str, node: NodeEnvironment, scratch: Path, worker: str, patience: float
    ) -> None:
        """
        Args:
            patience: seconds that the gang's other nodes are waited for.
        """
        self._run = run
        self._patience = patience
        self._node = node
        self._folder = scratch / "supervisor"
        self._worker = worker
        self._starts = 0
        self._kill_at: float | None = None
        """When what still runs is killed; set when this pod is told to stop."""

    def run_to_end(self) -> int:
        """Starts the workers until they are done, fail of themselves, or are told to stop."""
        adopt_orphans()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._told_to_stop)
        shutil.rmtree(self._folder, ignore_errors=True)  # an emptyDir outlives a container
        oom_before = oom_kills()
        deadline = time.monotonic() + self._patience
        while True:
            ended = self._start_and_wait(deadline)
            if ended is not None and ended.code == 0:
                return self._done()
            if self._kill_at is not None or ended is None:
                return end_with(self._run, "train", judge_stopped(ended, self._node.grace))
            oom_now = oom_kills()
            oom_killed = None if oom_before is None or oom_now is None else oom_now > oom_before
            failure, again = judge(ended, self._node.nodes, oom_killed)
            if not again:
                return end_with(self._run, "train", failure)
            if ended.formed:
                deadline = time.monotonic() + self._patience
            if time.monotonic() >= deadline:
                raise NodeFailure(
                    "GangNotFormed",
                    f"no gang of {self._node.nodes} nodes has formed at {self._node.host}:"
                    f"{self._node.port} for {self._patience:.0f} s: {failure.message}",
                )
            log.warning("starting the workers again in place: %s", failure.message)
            time.sleep(PAUSE_SECONDS)

    def _done(self) -> int:
        trained = worker_files.read_result(self._start_folder)
        leave_termination(Termination(run=self._run, role="train", trained=trained))
        log.info("train: done")
        return int(ExitCode.OK)

    def _told_to_stop(self, number: int, frame: FrameType | None) -> None:
        if self._kill_at is None:
            grace = self._node.grace
            self._kill_at = time.monotonic() + grace - min(KILL_SECONDS, grace / 4)
            log.info("told to stop by %s; %s s to save", signal.Signals(number).name, grace)

    # --- one start ---------------------------------------------------------------------------

    @property
    def _start_folder(self) -> Path:
        return self._folder / f"start-{self._starts}"

    def _start_and_wait(self, deadline: float) -> Ended | None:
        """Starts the workers once and waits for their end; None where a stop came before."""
        launched = machine_time()
        unresolved = self._wait_for_name(deadline)
        if self._kill_at is not None:
            return None
        if unresolved:
            return Ended(1, False, {"kind": "rendezvous", "message": unresolved})
        self._starts += 1
        self._start_folder.mkdir(parents=True)
        process = subprocess.Popen(
            [sys.executable, "-m", agent.__name__, *self._torchrun_arguments(deadline)],
            env=self._worker_environment(launched),
            start_new_session=True,
        )
        try:
            self._wait(process)
        finally:
            process.kill()
            process.wait()
            kill_descendants()
        report = self._report_file
        return Ended(
            code=process.returncode,
            formed=self._formed(),
            report=json.loads(report.read_text()) if report.exists() else None,
            failure=worker_files.read_failure(self._start_folder),
            aborted=worker_files.read_abort(self._logs),
        )

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        """Until the agent ends; told to stop, until the workers have saved or time is up."""
        while process.poll() is None:
            if self._kill_at is not None:
                if not self._formed() or time.monotonic() >= self._kill_at:
                    return
                worker_files.ask_to_stop(self._start_folder)
            time.sleep(POLL_SECONDS)

    def _wait_for_name(self, deadline: float) -> str:
        """Waits until the rendezvous' name resolves (a negative answer is cached up to 30 s by
        DNS servers); why it does not, when time is up."""
        if self._node.rank == 0 or self._node.loopback:
            return ""
        while self._kill_at is None:
            try:
                socket.getaddrinfo(self._node.host, self._node.port, type=socket.SOCK_STREAM)
                return ""
            except OSError as error:
                if time.monotonic() >= deadline:
                    return f"{self._node.host} does not resolve: {error}"
            time.sleep(PAUSE_SECONDS)
        return ""

    def _formed(self) -> bool:
        """Whether the workers were started: torchrun then makes a folder for the words of each."""
        return any(self._logs.glob("*/attempt_*"))

    @property
    def _logs(self) -> Path:
        return self._start_folder / "torchrun"

    @property
    def _report_file(self) -> Path:
        return self._start_folder / "agent.json"

    def _torchrun_arguments(self, deadline: float) -> list[str]:
        node = self._node
        join = max(1, int(deadline - time.monotonic()))
        rendezvous = {
            "is_host": int(node.rank == 0),
            "read_timeout": CONNECT_SECONDS,
            "join_timeout": join,
        }
        arguments = {
            "nnodes": node.nodes,
            "nproc-per-node": node.processes,
            "rdzv-backend": "c10d",
            "rdzv-endpoint": f"{node.host}:{node.port}",
            "rdzv-id": self._run,
            "rdzv-conf": ",".join(f"{key}={value}" for key, value in rendezvous.items()),
            "max-restarts": 0,
            "log-dir": self._logs,
            "tee": 2,  # to the log, and to files that tell why NCCL aborted a worker
        }
        if node.loopback and sys.platform == "linux":
            # Ranks follow the order of addresses: the node of rank 0 has the first process.
            arguments["local-addr"] = f"127.0.0.{node.rank + 1}"
        return [*(f"--{key}={value}" for key, value in arguments.items()), "-m", self._worker]

    def _worker_environment(self, launched: float) -> dict[str, str]:
        own = {
            # Else a survivor of a lost node keeps the old store's address, and the gang hangs.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            worker_files.ENV_FOLDER: str(self._start_folder),
            worker_files.ENV_LAUNCHED: str(launched),
            agent.ENV_REPORT: str(self._report_file),
        }
        if not _ALLOCATION & os.environ.keys():
            # No two steps have rows of the same lengths: blocks of a GPU's memory that cannot grow
            # would be left with holes.
            own["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
        if self._node.loopback and sys.platform == "linux":
            own["GLOO_SOCKET_IFNAME"] = "lo"
        return {**os.environ, **thread_environment(os.environ, self._node.processes), **own}


if __name__ == "__main__":
    sys.exit(supervise())
