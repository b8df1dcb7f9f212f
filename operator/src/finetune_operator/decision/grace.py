"""The grace period of a gang's pods: long enough to save a checkpoint."""

from __future__ import annotations

from typing import Final

from finetune_api.results import MemoryEstimate
from finetune_api.spec import FineTuneJobSpec
from finetune_operator.config import GRACE_SECONDS, LONGEST_GRACE_SECONDS

BYTES_PER_SECOND: Final = 100 * 2**20
"""Assumed rate at which a pod writes to object storage, before one has been measured."""


def grace_seconds(
    spec: FineTuneJobSpec, memory: MemoryEstimate | None, save_seconds: int | None
) -> int:
    """Return terminationGracePeriodSeconds of the gang's pods.

    Args:
        memory: prepare's estimate of a process; None if it is not known any more.
        save_seconds: the longest measured time to save; None before the first checkpoint.
    """
    given = spec.compute.termination_grace_period_seconds
    if given is not None:
        return given
    if save_seconds is None and memory is not None:
        save_seconds = _state_bytes(spec, memory) // BYTES_PER_SECOND
    # A minute for the step and the upload that are under way; storage may be slower than before.
    return min(max(GRACE_SECONDS, 60 + 2 * (save_seconds or 0)), LONGEST_GRACE_SECONDS)


def _state_bytes(spec: FineTuneJobSpec, memory: MemoryEstimate) -> int:
    """Bytes that a pod saves: float32 weights, as many as gradients, and the optimizer's state. The
    processes of an unsharded model hold the same."""
    of_process = memory.parts.get("gradients", 0) + memory.parts.get("optimizer", 0)
    whole = memory.sharding == "NoShard"
    return of_process * (1 if whole else spec.compute.effective_processes_per_node)
