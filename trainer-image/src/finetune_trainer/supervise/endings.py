"""How the workers of one node ended, and what follows: pure.

Three sources speak of an end, and the one nearest to the cause is believed: a worker's own words,
then the signal that killed one (it had no words), then what torchrun says of the gang.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Any

from finetune_api.results import Failure
from finetune_trainer.failures import (
    PEER_LOST,
    Interrupted,
    NodeFailure,
    OutOfMemory,
    TrainerError,
    failure_of,
    recognise_text,
)


@dataclass(frozen=True)
class Ended:
    """One start of the workers, after its end."""

    code: int
    """Exit code of the agent; negative: the signal that killed it."""
    formed: bool
    """Whether the gang had formed, so that workers ran."""
    report: dict[str, Any] | None = None
    """What the agent says (``agent``)."""
    failure: Failure | None = None
    """What the workers say (``worker_files.read_failure``)."""
    aborted: str = ""
    """Why NCCL's watchdog ended a worker, where it did (``worker_files.read_abort``)."""


def judge(ended: Ended, nodes: int, oom_killed: bool | None) -> tuple[Failure, bool]:
    """Why this node's workers ended, and whether it should start them again in place.

    Args:
        nodes: of the gang. A gang of one has no peers to wait for.
        oom_killed: whether the kernel killed for want of memory meanwhile; None: unknown.
    """
    said = ended.failure
    follows = said is not None and (said.reason == PEER_LOST or said.failure_class == "Preempted")
    if said is not None and not follows:
        return said, False
    if (number := _killer(ended)) is not None:
        killed = failure_of(_killed(number, nodes, oom_killed, ended.aborted))
        return killed, killed.reason == PEER_LOST
    if said is not None:
        return said, nodes > 1
    if ended.report is not None and ended.report["kind"] == "rendezvous":
        return _not_formed(ended.report["message"]), nodes > 1
    codes = (ended.report or {}).get("codes", {"torchrun": ended.code})
    words = ", ".join(f"{rank} with {code}" for rank, code in codes.items())
    return failure_of(
        TrainerError(
            "WorkerExited", f"training processes ended without a word: {words}; see the log"
        )
    ), False


def judge_stopped(ended: Ended | None, grace: int) -> Failure:
    """The last word of a node that was told to stop: what the workers say where no other try can
    mend it, else that it was interrupted.

    Args:
        ended: None where no workers ran.
        grace: seconds that they had.
    """
    said = ended.failure if ended else None
    if said is not None and (said.failure_class == "Preempted" or not said.retryable):
        return said
    if ended is None or not ended.formed:
        return failure_of(Interrupted("Interrupted", "stopped before the gang had formed"))
    why = (
        f"the workers ended before: {said.message if said else 'without a word'}"
        if ended.code >= 0
        else f"{grace} s were too short; give the pod a longer terminationGracePeriodSeconds"
    )
    what = f"stopped with the state unsaved ({why}); training goes on from the last checkpoint"
    return failure_of(Interrupted("InterruptedUnsaved", what))


def _not_formed(why: str) -> Failure:
    return failure_of(NodeFailure(PEER_LOST, f"the gang did not form: {why}"))


def _killer(ended: Ended) -> int | None:
    """Signal that killed a worker or the agent. SIGTERM is the agent's own way to end workers."""
    codes = list((ended.report or {}).get("codes", {}).values()) or [ended.code]
    return next((-code for code in codes if code < 0 and -code != signal.SIGTERM), None)


def _killed(number: int, nodes: int, oom_killed: bool | None, aborted: str) -> TrainerError:
    name = signal.Signals(number).name
    what = f"a training process was killed by {name}"
    if number == signal.SIGKILL and oom_killed is not False:
        return OutOfMemory(
            "HostOutOfMemory",
            f"{what}, as the kernel does when the memory limit is reached. Raise"
            " compute.resources.limits.memory (compute.sharedMemory counts too), lower"
            " training.microBatchTokens or, if it died while it was saving, set"
            " checkpoint.staging: Disk",
        )
    # NCCL's watchdog aborts a process before Python can say why: whose peers are gone, or whose own
    # kernel failed.
    if number == signal.SIGABRT and (known := recognise_text(aborted)) is not None:
        return known
    if number == signal.SIGABRT and nodes > 1:
        return NodeFailure(PEER_LOST, f"{what}, as NCCL does when a peer is gone; see the log")
    return NodeFailure("ProcessKilled", f"{what}; see its log, and the node's for hardware faults")
