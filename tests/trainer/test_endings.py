"""Failure and restart decisions after a node's workers have ended; the node environment."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from finetune_api.evaluation_results import DataSetScores
from finetune_api.results import TrainSummary
from finetune_trainer.failures import (
    GANG_GROWS,
    PEER_LOST,
    Diverged,
    Interrupted,
    NodeFailure,
    Stalled,
    StorageUnavailable,
    exit_code,
    failure_of,
)
from finetune_trainer.supervise import worker_files
from finetune_trainer.supervise.endings import Ended, judge, judge_stopped
from finetune_trainer.supervise.node_environment import NodeEnvironment, read_node_environment

DIVERGED = failure_of(Diverged("LossNotFinite", "the loss became nan"))
LOST = failure_of(NodeFailure(PEER_LOST, "another rank was lost"))
GROWS = failure_of(Interrupted(GANG_GROWS, "step 5 is saved"))
INTERRUPTED = failure_of(Interrupted("Interrupted", "step 5 is saved"))
STALLED = failure_of(Stalled("NoProgress", "rank 0 made no progress for 900 s"))
UNREACHABLE = failure_of(StorageUnavailable("StorageUnreachable", "no answer"))


def workers(**codes: int) -> dict[str, Any]:
    return {"kind": "workers", "codes": codes}


RENDEZVOUS = {"kind": "rendezvous", "message": "RendezvousTimeoutError: nobody came"}

# ended, nodes, OOM-killed -> reason, exit code, restart in place
CASES = {
    "own failure": (Ended(1, True, workers(a=13), DIVERGED), 2, None, "LossNotFinite", 13, False),
    "own failure beside a kill": (
        Ended(1, True, workers(a=13, b=-9), DIVERGED), 2, True, "LossNotFinite", 13, False,
    ),
    "own retryable failure": (
        Ended(1, True, workers(a=21), UNREACHABLE), 2, None, "StorageUnreachable", 21, False,
    ),
    "peers lost": (Ended(1, True, workers(a=20), LOST), 2, None, PEER_LOST, 20, True),
    "the lost peer of a single node is a process of its own": (
        Ended(1, True, workers(a=20), LOST), 1, False, "ProcessKilled", 20, True,
    ),
    "out of memory, of which torchrun saw only the survivor": (
        Ended(1, True, workers(a=20), LOST), 2, True, "HostOutOfMemory", 25, False,
    ),
    "a peer was stopped": (
        Ended(1, True, workers(a=23), INTERRUPTED), 2, None, "Interrupted", 23, True,
    ),
    "another node waits": (Ended(1, True, workers(a=23), GROWS), 2, None, GANG_GROWS, 23, True),
    "out of memory, reported as a lost peer by the other worker": (
        Ended(1, True, workers(a=20, b=-9), LOST), 2, True, "HostOutOfMemory", 25, False,
    ),
    "killed, cause unknown": (Ended(1, True, workers(a=-9)), 2, None, "HostOutOfMemory", 25, False),
    "killed, not for memory": (Ended(1, True, workers(a=-9)), 2, False, "ProcessKilled", 20, True),
    "agent killed for memory": (Ended(-9, True), 2, True, "HostOutOfMemory", 25, False),
    "segmentation fault": (Ended(1, True, workers(a=-11)), 2, True, "ProcessKilled", 20, True),
    "NCCL aborts": (Ended(1, True, workers(a=-6)), 2, None, PEER_LOST, 20, True),
    "NCCL aborts after a kernel fault": (
        Ended(
            1, True, workers(a=-6),
            aborted="CUDA error: device-side assert triggered\nSearch for `cudaErrorAssert'",
        ),
        2, None, "KernelFailed", 15, False,
    ),
    "NCCL aborts after a device fault": (
        Ended(1, True, workers(a=-6), aborted="CUDA error: uncorrectable ECC error encountered"),
        2, None, "DeviceFault", 20, False,
    ),
    "NCCL aborts after a lost peer": (
        Ended(
            1, True, workers(a=-6),
            aborted="[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(...)",
        ),
        2, None, PEER_LOST, 20, True,
    ),
    "abort on a single node": (Ended(1, True, workers(a=-6)), 1, None, "ProcessKilled", 20, True),
    "ended by the agent after a worker failed": (
        Ended(1, True, workers(a=-15, b=20), LOST), 2, None, PEER_LOST, 20, True,
    ),
    "rendezvous timeout": (Ended(1, False, RENDEZVOUS), 2, None, PEER_LOST, 20, True),
    "rendezvous timeout on one node": (Ended(1, False, RENDEZVOUS), 1, None, PEER_LOST, 20, False),
    "no failure file": (Ended(1, True, workers(a=1)), 2, None, "WorkerExited", 22, False),
    "no report of the agent": (Ended(1, False), 2, None, "WorkerExited", 22, False),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_judge(case: tuple[Ended, int, bool | None, str, int, bool]) -> None:
    ended, nodes, oom_killed, reason, code, again = case
    failure, goes_on = judge(ended, nodes, oom_killed)
    assert (failure.reason, int(exit_code(failure)), goes_on) == (reason, code, again)
    assert failure.message


def test_a_process_lost_again_ends_the_pod() -> None:
    for nodes, ended in (
        (1, Ended(1, True, workers(a=20), LOST)),
        (2, Ended(1, True, workers(a=-11))),
    ):
        failure, again = judge(ended, nodes, False, restarted=True)
        assert (failure.reason, again) == ("ProcessKilled", False)


@pytest.mark.parametrize(
    ("ended", "reason", "code"),
    [
        (None, "Interrupted", 23),
        (Ended(-9, False), "Interrupted", 23),
        (Ended(1, True, workers(a=23), INTERRUPTED), "Interrupted", 23),
        (Ended(-9, True), "InterruptedUnsaved", 23),
        (Ended(1, True, workers(a=20), LOST), "InterruptedUnsaved", 23),
        (Ended(1, True, workers(a=1)), "InterruptedUnsaved", 23),
        (Ended(1, True, workers(a=13), DIVERGED), "LossNotFinite", 13),
    ],
)
def test_judge_stopped(ended: Ended | None, reason: str, code: int) -> None:
    failure = judge_stopped(ended, 30)
    assert (failure.reason, int(exit_code(failure))) == (reason, code)


def test_non_finite_metrics_reach_the_supervisor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(worker_files.ENV_FOLDER, str(tmp_path))
    odd = {"Loss": math.nan, "Perplexity": math.inf}
    scores = [DataSetScores(name="test", samples=1, base=odd, tuned={"Loss": 1.0})]
    worker_files.leave_result(TrainSummary(attempt=1, restarts=0, steps=3, scores=scores))
    found = worker_files.read_result(tmp_path)
    assert found is not None
    assert math.isnan(found.scores[0].base["Loss"])
    assert found.scores[0].base["Perplexity"] == math.inf


def test_read_node_environment() -> None:
    assert read_node_environment({}) == NodeEnvironment(1, 1, 0, "127.0.0.1", 0, 30)
    environ = {
        "FINETUNE_NODES": "3",
        "FINETUNE_PROCESSES_PER_NODE": "8",
        "JOB_COMPLETION_INDEX": "2",
        "FINETUNE_RENDEZVOUS": "job-0.job:29400",
        "FINETUNE_GRACE_SECONDS": "120",
    }
    place = NodeEnvironment(3, 8, 2, "job-0.job", 29400, 120)
    assert read_node_environment(environ) == place and not place.loopback
    assert read_node_environment({**environ, "FINETUNE_NODE_RANK": "1"}).rank == 1
    for name, value in [
        ("FINETUNE_NODES", "0"),
        ("FINETUNE_NODES", "2"),
        ("FINETUNE_PROCESSES_PER_NODE", "many"),
        ("FINETUNE_RENDEZVOUS", ""),
        ("FINETUNE_RENDEZVOUS", "job-0.job"),
        ("FINETUNE_GRACE_SECONDS", "-1"),
    ]:
        with pytest.raises(Exception, match=r"must be") as caught:
            read_node_environment({**environ, name: value})
        assert "FINETUNE_" in str(caught.value)


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_first_stall_restarts_in_place(nodes: int) -> None:
    ended = Ended(1, True, workers(a=24, b=-9), STALLED)
    assert judge(ended, nodes, None) == (STALLED, True)
    assert judge(ended, nodes, None, restarted=True) == (STALLED, False)
    assert exit_code(STALLED) == 24
