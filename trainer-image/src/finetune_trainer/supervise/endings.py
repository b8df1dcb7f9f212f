"""Pure functions from the end of a node's workers to its failure and to a restart in place.

Three sources describe an end. The one nearest to the cause wins: a worker's failure file, then the
signal that killed a worker (which could not write a file), then torchrun's report.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Any, Final

from finetune_api.results import Failure
from finetune_trainer.failures import (
    PEER_LOST,
    HostOutOfMemory,
    Interrupted,
    NodeFailure,
    TrainerError,
    Unexpected,
    failure_of,
    recognise_text,
)

KILLED: Final = "ProcessKilled"
"""Reason of a NodeFailure: a process of this pod was killed by a signal."""


@dataclass(frozen=True)
class Ended:
    """The end of one start of the workers."""

    code: int
    """Exit code of the agent; negative: the number of the signal that killed it."""
    formed: bool
    """Whether the rendezvous completed, so that workers ran."""
    report: dict[str, Any] | None = None
    """Report of the agent (see ``agent``)."""
    failure: Failure | None = None
    """Failure that the workers reported (``worker_files.read_failure``)."""
    aborted: str = ""
    """Error with which NCCL's watchdog aborted a worker, if any (``worker_files.read_abort``)."""


def judge(
    ended: Ended, nodes: int, oom_killed: bool | None, restarted: bool = False
) -> tuple[Failure, bool]:
    """Return why this node's workers ended, and whether to restart them in place.

    Args:
        nodes: number of nodes of the run. A single node has no peers to wait for.
        oom_killed: whether the kernel OOM-killed a process meanwhile; None: unknown.
        restarted: whether the pod has restarted for a failure of its own since the last checkpoint.
    """
    said = ended.failure
    if said is not None and said.failure_class == "Stalled":
        return said, not restarted
    follows = said is not None and (said.reason == PEER_LOST or said.failure_class == "Preempted")
    if said is not None and not follows:
        return said, False
    if (number := _killer(ended)) is not None:
        killed = failure_of(_killed(number, nodes, oom_killed, ended.aborted))
        again = killed.reason == PEER_LOST or (killed.reason == KILLED and not restarted)
        return killed, again
    if said is not None and said.reason == PEER_LOST and (oom_killed or nodes == 1):
        # torchrun reports one process, and that was the survivor.
        lost = _lost_here(said.message, bool(oom_killed))
        return failure_of(lost), isinstance(lost, NodeFailure) and not restarted
    if said is not None:
        return said, nodes > 1
    if ended.report is not None and ended.report["kind"] == "rendezvous":
        return _without_peers(ended.formed, ended.report["message"]), nodes > 1
    codes = (ended.report or {}).get("codes", {"torchrun": ended.code})
    words = ", ".join(f"{rank} with {code}" for rank, code in codes.items())
    return failure_of(
        Unexpected(
            "WorkerExited", f"training processes exited without a report: {words}; see the log"
        )
    ), False


def judge_stopped(ended: Ended | None, grace: int) -> Failure:
    """Return the failure of a node that was requested to stop: the workers' failure if no retry can
    help or if it is an interruption, else an interruption.

    Args:
        ended: None if no workers were started.
        grace: the pod's grace period in seconds.
    """
    said = ended.failure if ended else None
    if said is not None and (said.failure_class == "Preempted" or not said.retryable):
        return said
    if ended is None or not ended.formed:
        return failure_of(Interrupted("Interrupted", "stopped before the process group had formed"))
    why = (
        f"the workers had ended before: {said.message if said else 'no report'}"
        if ended.code >= 0
        else f"{grace} s were too short; raise compute.terminationGracePeriodSeconds"
    )
    what = f"stopped with the state unsaved ({why}); training continues from the last checkpoint"
    return failure_of(Interrupted("InterruptedUnsaved", what))


def _without_peers(formed: bool, why: str) -> Failure:
    what = "other nodes are lost" if formed else "the process group did not form"
    return failure_of(NodeFailure(PEER_LOST, f"{what}: {why}"))


def _killer(ended: Ended) -> int | None:
    """Return the signal that killed a worker or the agent, except SIGTERM: the agent ends workers
    with it."""
    codes = list((ended.report or {}).get("codes", {}).values()) or [ended.code]
    return next((-code for code in codes if code < 0 and -code != signal.SIGTERM), None)


def _killed(number: int, nodes: int, oom_killed: bool | None, aborted: str) -> TrainerError:
    name = signal.Signals(number).name
    what = f"a training process was killed by {name}"
    if number == signal.SIGKILL and oom_killed is not False:
        return _out_of_memory(what)
    # NCCL's watchdog aborts a process before Python can report the cause: a lost peer, or a failed
    # kernel of this process.
    if number == signal.SIGABRT and (known := recognise_text(aborted)) is not None:
        return known
    if number == signal.SIGABRT and nodes > 1:
        return NodeFailure(PEER_LOST, f"{what}, as NCCL does when a peer is lost; see the log")
    return NodeFailure(KILLED, f"{what}; see its log, and the node's for hardware faults")


def _lost_here(why: str, oom_killed: bool) -> TrainerError:
    """The failure of a pod of which a process was lost, as another one reports."""
    what = f"a training process of this pod was lost ({why})"
    if oom_killed:
        return _out_of_memory(what)
    return NodeFailure(KILLED, f"{what}; see its log, and the node's for hardware faults")


def _out_of_memory(what: str) -> HostOutOfMemory:
    return HostOutOfMemory(
        "HostOutOfMemory",
        f"{what}, as the kernel does when the memory limit is reached. Raise"
        " compute.resources.limits.memory (compute.sharedMemory counts too), lower"
        " training.microBatchTokens or, if it died while it was saving, set"
        " checkpoint.staging: Disk",
    )
