"""What a node says and does after its workers have ended, and its place: tables."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from finetune_api.results import DataSetScores, TrainSummary
from finetune_trainer.failures import (
    PEER_LOST,
    Diverged,
    Interrupted,
    NodeFailure,
    StorageUnavailable,
    exit_code,
    failure_of,
)
from finetune_trainer.supervise import worker_files
from finetune_trainer.supervise.endings import Ended, judge, judge_stopped
from finetune_trainer.supervise.node_environment import NodeEnvironment, read_node_environment

DIVERGED = failure_of(Diverged("LossNotFinite", "the loss became nan"))
LOST = failure_of(NodeFailure(PEER_LOST, "another process of the gang is gone"))
INTERRUPTED = failure_of(Interrupted("Interrupted", "step 5 is saved"))
UNREACHABLE = failure_of(StorageUnavailable("StorageUnreachable", "no answer"))


def workers(**codes: int) -> dict[str, Any]:
    return {"kind": "workers", "codes": codes}


RENDEZVOUS = {"kind": "rendezvous", "message": "RendezvousTimeoutError: nobody came"}

# ended, nodes, killed for want of memory -> reason, exit code, again in place
CASES = {
    "own failure": (Ended(1, True, workers(a=13), DIVERGED), 2, None, "LossNotFinite", 13, False),
    "own failure beside a kill": (
        Ended(1, True, workers(a=13, b=-9), DIVERGED), 2, True, "LossNotFinite", 13, False,
    ),
    "own failure that may pass": (
        Ended(1, True, workers(a=21), UNREACHABLE), 2, None, "StorageUnreachable", 21, False,
    ),
    "peers lost": (Ended(1, True, workers(a=20), LOST), 2, None, PEER_LOST, 20, True),
    "a gang of one has no peers": (
        Ended(1, True, workers(a=20), LOST), 1, None, PEER_LOST, 20, False,
    ),
    "a peer was told to stop": (
        Ended(1, True, workers(a=23), INTERRUPTED), 2, None, "Interrupted", 23, True,
    ),
    "out of memory, its neighbour lost it": (
        Ended(1, True, workers(a=20, b=-9), LOST), 2, True, "HostOutOfMemory", 14, False,
    ),
    "killed, cause unknown": (Ended(1, True, workers(a=-9)), 2, None, "HostOutOfMemory", 14, False),
    "killed, not for memory": (Ended(1, True, workers(a=-9)), 2, False, "ProcessKilled", 20, False),
    "agent killed for memory": (Ended(-9, True), 2, True, "HostOutOfMemory", 14, False),
    "segmentation fault": (Ended(1, True, workers(a=-11)), 2, True, "ProcessKilled", 20, False),
    "NCCL aborts": (Ended(1, True, workers(a=-6)), 2, None, PEER_LOST, 20, True),
    "NCCL aborts for a kernel of its own": (
        Ended(
            1, True, workers(a=-6),
            aborted="CUDA error: device-side assert triggered\nSearch for `cudaErrorAssert'",
        ),
        2, None, "KernelFailed", 15, False,
    ),
    "NCCL aborts for a device": (
        Ended(1, True, workers(a=-6), aborted="CUDA error: uncorrectable ECC error encountered"),
        2, None, "DeviceFault", 20, False,
    ),
    "NCCL aborts for a peer": (
        Ended(
            1, True, workers(a=-6),
            aborted="[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(...)",
        ),
        2, None, PEER_LOST, 20, True,
    ),
    "abort of a gang of one": (Ended(1, True, workers(a=-6)), 1, None, "ProcessKilled", 20, False),
    "ended by the agent with its neighbour": (
        Ended(1, True, workers(a=-15, b=20), LOST), 2, None, PEER_LOST, 20, True,
    ),
    "nobody came": (Ended(1, False, RENDEZVOUS), 2, None, PEER_LOST, 20, True),
    "no rendezvous of one's own": (Ended(1, False, RENDEZVOUS), 1, None, PEER_LOST, 20, False),
    "no word": (Ended(1, True, workers(a=1)), 2, None, "WorkerExited", 15, False),
    "agent without a word": (Ended(1, False), 2, None, "WorkerExited", 15, False),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_judge(case: tuple[Ended, int, bool | None, str, int, bool]) -> None:
    ended, nodes, oom_killed, reason, code, again = case
    failure, goes_on = judge(ended, nodes, oom_killed)
    assert (failure.reason, int(exit_code(failure)), goes_on) == (reason, code, again)
    assert failure.message


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


def test_a_metric_that_is_no_number_reaches_the_supervisor(
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


def test_place() -> None:
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
