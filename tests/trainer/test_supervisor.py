"""The supervisor as it runs in pods; two of them on loopback act as two nodes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from supervisors import MAIN, Nodes

# Trains until the test ends it, and saves on a stop request, like the real worker.
WORKER = """
import os, sys, time
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from finetune_api.results import (TrainSummary)
from finetune_trainer.supervise import worker_files
from finetune_trainer.failures import Interrupted, exit_code, failure_of
from finetune_trainer.train.startup import StartupClock

shared = Path(os.environ["SHARED"])

def work():
    startup = StartupClock.of_this_process()
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    node = os.environ["FINETUNE_NODE_RANK"]
    step = 0
    while True:
        flags = [worker_files.stop_requested(), (shared / "end").exists()]
        wish = torch.tensor(flags, dtype=torch.float32)
        dist.all_reduce(wish)
        step += 1
        if step == 3:
            (shared / f"training-{node}-{rank}-{os.getpid()}").touch()
        if wish[0] > 0:
            (shared / f"saved-{node}").touch()
            raise Interrupted("Interrupted", f"step {step} is saved")
        if wish[1] > 0:
            break
        time.sleep(0.01)
    if rank == 0:
        told = startup.first_step(from_step=0, compiling=None)
        worker_files.leave_result(TrainSummary(attempt=1, restarts=0, steps=step, startup=told))

def main():
    try:
        work()
    except BaseException as error:
        worker_files.report_failure(error)
        print("worker ends:", repr(error), flush=True)
        return int(exit_code(failure_of(error)))
    return 0
"""

THREADS = """
def main():
    import os
    from pathlib import Path
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")
    Path(os.environ["SHARED"], "threads-" + "-".join(map(os.environ.get, names))).touch()
"""

USER_ERROR = """
def main():
    import os, sys, time
    from finetune_trainer.supervise import worker_files
    from finetune_trainer.failures import UserError
    if os.environ["RANK"] == "1":
        told = UserError("ModelTooSmall", "model.source: too small; take another")
        worker_files.report_failure(told)
        sys.exit(1)
    time.sleep(60)
"""

KILLED = """
import os, signal
from pathlib import Path
def main():
    (Path(os.environ["SHARED"]) / f"killed-{os.getpid()}").touch()
    os.kill(os.getpid(), signal.SIGSEGV)
"""
ABORTED = """
import os, sys
def main():
    print("terminate called after throwing an instance of 'c10::DistBackendError'", file=sys.stderr)
    print("  what():  [PG ID 0 PG GUID 0(default_pg) Rank 0] Process group watchdog thread"
          " terminated with exception: CUDA error: an illegal memory access was encountered",
          file=sys.stderr)
    sys.stderr.flush()
    os.abort()
"""
STALLED = """
def main():
    import os, sys
    from pathlib import Path
    from finetune_trainer.supervise import worker_files
    from finetune_trainer.failures import Stalled
    (Path(os.environ["SHARED"]) / f"training-0-0-{os.getpid()}").touch()
    worker_files.report_failure(Stalled("NoProgress", "rank 0 made no progress for 900 s"))
    os._exit(24)
"""
STUBBORN = """
def main():
    import os, signal, time
    from pathlib import Path
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (Path(os.environ["SHARED"]) / f"training-0-0-{os.getpid()}").touch()
    time.sleep(600)
"""


def start_world(nodes: Nodes) -> list[subprocess.Popen[bytes]]:
    return [nodes.start(WORKER, rank, FINETUNE_NODES=2) for rank in (0, 1)]


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_training_resumes_after_a_lost_node_and_finishes(nodes: Nodes) -> None:
    world = start_world(nodes)
    first = nodes.wait_for("training-*", 2)
    assert [path.name.split("-")[1:3] for path in first] == [["0", "0"], ["1", "1"]]
    for lost in (1, 0):
        before = len(list(nodes.shared.glob("training-*")))
        nodes.kill_node(world[lost])
        began = time.monotonic()
        world[lost] = nodes.start(WORKER, lost, FINETUNE_NODES=2)
        nodes.wait_for("training-*", before + 2)
        print(f"training again {time.monotonic() - began:.1f} s after node {lost} was lost")
    assert not any(runs(int(path.name.split("-")[-1])) for path in first)
    (nodes.shared / "end").touch()
    assert [nodes.end(process) for process in world] == [0, 0], nodes.logs()
    trained = nodes.termination(0).trained
    assert trained is not None and trained.steps > 3
    assert trained.startup is not None
    assert list(trained.startup.seconds) == ["launch", "import", "step"]
    assert trained.startup.seconds["launch"] > 0, "torchrun start and rendezvous"
    assert nodes.termination(1).trained is None
    assert nodes.termination(1).failure is None


@pytest.mark.slow
def test_a_stop_saves_and_the_other_node_waits(nodes: Nodes) -> None:
    world = start_world(nodes)
    nodes.wait_for("training-*", 2)
    world[1].send_signal(signal.SIGTERM)
    assert nodes.end(world[1]) == 23, nodes.logs()
    failure = nodes.termination(1).failure
    assert failure is not None
    assert (failure.failure_class, failure.retryable) == ("Preempted", True)
    assert "is saved" in failure.message
    nodes.wait_for("saved-*", 2)
    nodes.wait_for_log("restarting the workers in place")
    assert world[0].poll() is None
    world[0].send_signal(signal.SIGTERM)  # without a process group there is nothing to save
    assert nodes.end(world[0]) == 23, nodes.logs()
    failure = nodes.termination(0).failure
    assert failure is not None and "before the process group had formed" in failure.message


def test_a_worker_failure_ends_the_pod_with_its_reason_and_exit_code(nodes: Nodes) -> None:
    assert nodes.end(nodes.start(USER_ERROR, FINETUNE_PROCESSES_PER_NODE=2)) == 10, nodes.logs()
    word = nodes.termination()
    assert (word.run, word.role) == ("1-abcde", "train")
    assert word.failure is not None
    assert (word.failure.failure_class, word.failure.reason) == ("UserError", "ModelTooSmall")


def test_a_worker_killed_by_a_signal_is_reported(nodes: Nodes) -> None:
    assert nodes.end(nodes.start(KILLED)) == 20, nodes.logs()
    assert len(list(nodes.shared.glob("killed-*"))) == 2, "restarted in place once"
    failure = nodes.termination().failure
    assert failure is not None
    assert failure.reason == "ProcessKilled" and "killed by SIGSEGV" in failure.message


def test_a_stall_restarts_the_workers_once_and_then_ends_the_pod(nodes: Nodes) -> None:
    assert nodes.end(nodes.start(STALLED)) == 24, nodes.logs()
    assert len(list(nodes.shared.glob("training-*"))) == 2
    failure = nodes.termination().failure
    assert failure is not None
    assert (failure.failure_class, failure.retryable) == ("Stalled", True)


def test_an_nccl_abort_after_a_kernel_fault_ends_the_pod(nodes: Nodes) -> None:
    """It must not be taken for a lost peer, which would restart the workers forever."""
    assert nodes.end(nodes.start(ABORTED)) == 15, nodes.logs()
    failure = nodes.termination().failure
    assert failure is not None
    assert failure.reason == "KernelFailed" and "illegal memory access" in failure.message
    log = (nodes.folder / "node-0/log").read_text()
    assert "watchdog thread" in log, "stderr is in the log too"


def test_a_worker_that_does_not_save_in_time_is_killed(nodes: Nodes) -> None:
    process = nodes.start(STUBBORN, FINETUNE_GRACE_SECONDS=2)
    worker = int(nodes.wait_for("training-*")[0].name.split("-")[-1])
    process.send_signal(signal.SIGTERM)
    assert nodes.end(process) == 23
    failure = nodes.termination().failure
    assert failure is not None and failure.reason == "InterruptedUnsaved"
    assert not runs(worker)


@pytest.mark.parametrize(("deadline", "ends"), [(1, True), (3600, False)])
def test_nodes_are_waited_for_until_the_start_deadline(
    nodes: Nodes, deadline: int, ends: bool
) -> None:
    nodes.write_run_spec(scheduling={"startDeadlineSeconds": deadline})
    main = f"from finetune_trainer.supervise import supervisor; supervisor.FORM_SECONDS = 1; {MAIN}"
    alone = nodes.start(WORKER, main=main, FINETUNE_NODES=2)
    if ends:
        assert nodes.end(alone) == 20, nodes.logs()
        failure = nodes.termination().failure
        assert failure is not None and failure.reason == "GangNotFormed"
    else:
        with pytest.raises(subprocess.TimeoutExpired):
            alone.wait(15)


def test_an_invalid_environment_is_refused(nodes: Nodes) -> None:
    assert nodes.end(nodes.start(KILLED, FINETUNE_NODES=2, FINETUNE_RENDEZVOUS="nowhere")) == 10
    failure = nodes.termination().failure
    assert failure is not None and "FINETUNE_RENDEZVOUS='nowhere'" in failure.message


def test_the_supervisor_stays_small() -> None:
    code = "import sys, finetune_trainer.supervise.supervisor;"
    code += " print([m for m in ('torch', 'transformers', 'boto3') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_workers_wait_passively_with_the_threads_that_the_user_has_set(nodes: Nodes) -> None:
    nodes.end(nodes.start(THREADS, OMP_NUM_THREADS=3))
    assert [path.name for path in nodes.wait_for("threads-*")] == ["threads-3-PASSIVE"]
