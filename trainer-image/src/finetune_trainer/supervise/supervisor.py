"""Main process of a training pod: starts the node's workers and reports how they ended.

    start ──► agent (torchrun) ──► workers ──► end
      ▲                                          │ success: summary, exit 0
      └── peers or a process were lost, a stall, ┤ failure of this node: failure and its exit code
          or the process group did not form      └ SIGTERM: save within the grace period, exit 23

The supervisor imports neither torch nor transformers: it must stay small, and survive its workers.
A pod that only lost its peers restarts its workers in place and waits for the replacement, so that
one incident costs one pod. A pod whose own process was killed or stalled does so too, once between
two checkpoints; any other failure of a worker ends the pod. See ``fork_server`` for how a start in
place is fast.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Final

from finetune_api.names import ExitCode
from finetune_api.results import Failure, Termination
from finetune_trainer.failures import NodeFailure
from finetune_trainer.stage import (
    end_badly,
    end_with,
    leave_termination,
    load_run_spec,
    scratch_folder,
    start_log,
)
from finetune_trainer.supervise import agent, fork_server, worker_files
from finetune_trainer.supervise.endings import KILLED, Ended, judge, judge_stopped
from finetune_trainer.supervise.node_environment import NodeEnvironment, read_node_environment
from finetune_trainer.supervise.processes import (
    adopt_orphans,
    kill_descendants,
    machine_time,
    oom_kills,
    started_at,
)
from finetune_trainer.threads import thread_environment

log = logging.getLogger(__name__)

WORKER: Final = "finetune_trainer.train.process"
FORM_SECONDS: Final = 1800
"""Minimum of the time to wait for the process group to form before the pod ends and is replaced. A
longer scheduling.startDeadlineSeconds takes precedence: pods that already run must wait for nodes
that are still being scheduled, since the end of a pod counts as an incident."""
CONNECT_SECONDS: Final = 60
"""Timeout of one connection attempt to the rendezvous; then its name is resolved again."""
LAST_CALL_SECONDS: Final = 60
"""Time to wait for the other nodes of an elastic gang once compute.minNodes are there."""
PAUSE_SECONDS: Final = 0.5
_ALLOCATION: Final = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
"""Environment variables of torch's CUDA allocator, the newer and the older name."""
POLL_SECONDS: Final = 0.05
STOP_SECONDS: Final = 3
"""Time between SIGTERM and SIGKILL for the workers beside a failed one. They save nothing then."""
KILL_SECONDS: Final = 3
"""Seconds of the grace period reserved for killing processes and the termination message."""


def supervise(worker: str = WORKER) -> int:
    """Train as one node and return the container's exit code.

    Takes over the process: installs signal handlers, and kills all descendants at the end.

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
        fewest = min(node.nodes, run_spec.spec.compute.min_nodes or node.nodes)
        return Supervisor(run, node, scratch_folder(), worker, patience, fewest).run_to_end()
    except Exception as error:
        return end_badly(run, "train", error)
    finally:
        kill_descendants()


class Supervisor:
    """Supervises the workers of one node over all of their starts."""

    def __init__(
        self, run: str, node: NodeEnvironment, scratch: Path, worker: str, patience: float,
        fewest: int,
    ) -> None:  # fmt: skip
        """
        Args:
            patience: seconds to wait for the other nodes.
            fewest: nodes with which the gang trains if no others come.
        """
        self._run = run
        self._patience = patience
        self._fewest = fewest
        self._node = node
        self._folder = scratch / "supervisor"
        self._worker = worker
        self._starts = 0
        self._workers_ended = started_at() or machine_time()
        """Since when this node has had no workers, in ``machine_time``."""
        self._formed_in = ""
        """Folder of the last start whose workers ran."""
        self._kill_at: float | None = None
        """Monotonic time at which remaining processes are killed; None: no stop was requested."""

    def run_to_end(self) -> int:
        """Start the workers until they succeed, fail for a cause on this node, or are stopped.

        Raises:
            NodeFailure: 'GangNotFormed' if no process group formed for ``patience`` seconds.
        """
        adopt_orphans()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_stop_signal)
        shutil.rmtree(self._folder, ignore_errors=True)  # an emptyDir outlives a container
        oom_before = oom_kills()
        deadline = time.monotonic() + self._patience
        fork_server.set_up(self._worker, self._environment())
        restarted = False  # for a failure of this pod, since its last checkpoint
        while True:
            ended = self._start_and_wait(deadline)
            if ended is not None and ended.code == 0:
                return self._done()
            if self._kill_at is not None or ended is None:
                return self._failed(judge_stopped(ended, self._node.grace))
            oom_now = oom_kills()
            oom_killed = None if oom_before is None or oom_now is None else oom_now > oom_before
            restarted = restarted and not worker_files.has_committed(self._start_folder)
            failure, again = judge(ended, self._node.nodes, oom_killed, restarted)
            restarted |= failure.reason == KILLED or failure.failure_class == "Stalled"
            if not again:
                return self._failed(failure)
            if ended.formed:
                deadline = time.monotonic() + self._patience
            if time.monotonic() >= deadline:
                raise NodeFailure(
                    "GangNotFormed",
                    f"no process group of {self._fewest} nodes formed at {self._node.host}:"
                    f"{self._node.port} within {self._patience:.0f} s: {failure.message}",
                )
            log.warning("restarting the workers in place: %s", failure.message)
            time.sleep(PAUSE_SECONDS)

    def _done(self) -> int:
        trained = worker_files.read_result(self._start_folder)
        if trained is not None and trained.time is not None:
            trained = trained.model_copy(update={"time": trained.time.torn_down(time.time())})
        leave_termination(Termination(run=self._run, role="train", trained=trained))
        log.info("train: done")
        return int(ExitCode.OK)

    def _failed(self, failure: Failure) -> int:
        spent = worker_files.read_time(Path(self._formed_in)) if self._formed_in else None
        return end_with(self._run, "train", failure, spent)

    def _on_stop_signal(self, number: int, frame: FrameType | None) -> None:
        if self._kill_at is None:
            grace = self._node.grace
            self._kill_at = time.monotonic() + grace - min(KILL_SECONDS, grace / 4)
            log.info("stop requested by %s; %s s to save", signal.Signals(number).name, grace)

    # --- one start ---------------------------------------------------------------------------

    @property
    def _start_folder(self) -> Path:
        return self._folder / f"start-{self._starts}"

    def _start_and_wait(self, deadline: float) -> Ended | None:
        """Start the workers once and wait for their end; None: a stop was requested before."""
        unresolved = self._wait_for_name(deadline)
        if self._kill_at is not None:
            return None
        if unresolved:
            return Ended(1, False, {"kind": "rendezvous", "message": unresolved})
        self._starts += 1
        self._start_folder.mkdir(parents=True)
        helpers = fork_server.helpers()
        process = fork_server.start(
            agent.main, self._torchrun_arguments(deadline), self._start_environment()
        )
        try:
            self._wait(process)
        finally:
            process.kill()
            process.join()
            kill_descendants(helpers)
        report, formed = self._report_file, self._formed()
        if formed:
            self._workers_ended, self._formed_in = machine_time(), str(self._start_folder)
        return Ended(
            code=process.exitcode or 0,
            formed=formed,
            report=json.loads(report.read_text()) if report.exists() else None,
            failure=worker_files.read_failure(self._start_folder),
            aborted=worker_files.read_abort(self._logs),
        )

    def _wait(self, process: BaseProcess) -> None:
        """Wait for the agent to end. After a stop request: return immediately if no workers run,
        else pass the request on and wait at most until the grace period ends."""
        while process.is_alive():
            if self._kill_at is not None:
                if not self._formed() or time.monotonic() >= self._kill_at:
                    return
                worker_files.ask_to_stop(self._start_folder)
            process.join(POLL_SECONDS)

    def _wait_for_name(self, deadline: float) -> str:
        """Wait until the rendezvous host resolves (DNS servers cache negative answers up to 30 s).
        Return the error at the deadline, else an empty text."""
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
        """Whether the workers were started: torchrun makes a log folder for each of them."""
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
            "last_call_timeout": LAST_CALL_SECONDS,
        }
        arguments = {
            "nnodes": f"{self._fewest}:{node.nodes}",
            "nproc-per-node": node.processes,
            "rdzv-backend": agent.ELASTIC if self._fewest < node.nodes else "c10d",
            "rdzv-endpoint": f"{node.host}:{node.port}",
            "rdzv-id": self._run,
            "rdzv-conf": ",".join(f"{key}={value}" for key, value in rendezvous.items()),
            "max-restarts": 0,
            "start-method": fork_server.METHOD,
            "shutdown-timeout": STOP_SECONDS,
            "log-dir": self._logs,
            "tee": 2,  # stderr to the log and to files, which ``read_abort`` searches
        }
        if node.loopback and sys.platform == "linux":
            # torchrun orders ranks by address: node 0 gets rank 0.
            arguments["local-addr"] = f"127.0.0.{node.rank + 1}"
        return [*(f"--{key}={value}" for key, value in arguments.items()), "-m", self._worker]

    def _start_environment(self) -> dict[str, str]:
        """Return the variables of one start."""
        return {
            worker_files.ENV_FOLDER: str(self._start_folder),
            worker_files.ENV_LAUNCHED: str(self._workers_ended),
            worker_files.ENV_PREVIOUS: self._formed_in,
            agent.ENV_REPORT: str(self._report_file),
        }

    def _environment(self) -> dict[str, str]:
        """Return the variables of all starts."""
        own = {
            # Otherwise survivors of a lost node keep the old store's address, and rendezvous hangs.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "PYTHONUNBUFFERED": "1",
        }
        if not _ALLOCATION & os.environ.keys():
            # Micro-batch lengths differ at each step, which fragments memory blocks of fixed size.
            own["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
        if self._node.loopback and sys.platform == "linux":
            own["GLOO_SOCKET_IFNAME"] = "lo"
        return own | thread_environment(os.environ, self._node.processes, adaptive=True)


if __name__ == "__main__":
    sys.exit(supervise())
