"""Stop requests during an attempt: all ranks stop at the same point, with consistent state."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from finetune_trainer.engine.world import World
from finetune_trainer.failures import GANG_GROWS, Interrupted
from finetune_trainer.train.checkpoint import CheckpointManager

_SIGNAL_SECONDS: Final = 3.0


def raise_if_stopping(world: World, stop_requested: Callable[[], bool], where: str) -> None:
    """Stop here if a stop was requested on any rank; call only where no state is unsaved.

    Raises:
        Interrupted: on all ranks.
    """
    if any(world.on_all(stop_requested)):
        raise Interrupted("Interrupted", f"stopped on request, {where}")


def interrupted(stop: bool, saved: str) -> Interrupted:
    """Return the exception of an attempt that ends on request.

    Args:
        stop: whether a stop was requested; else another node waits to join.
        saved: what is saved.
    """
    if stop:
        return Interrupted("Interrupted", f"stopped on request; {saved}")
    return Interrupted(GANG_GROWS, f"{saved}; the gang starts again with the node that has joined")


@contextmanager
def releasing(
    world: World, checkpointer: CheckpointManager, stop_requested: Callable[[], bool]
) -> Iterator[None]:
    """End the attempt properly on ``Interrupted``, which is raised once the state is saved."""
    try:
        yield
    except Interrupted as why:
        if why.reason == GANG_GROWS:
            checkpointer.release()  # nothing is lost, and all ranks end together
        else:
            _end_attempt(world, checkpointer, stop_requested)
        raise


def _end_attempt(
    world: World, checkpointer: CheckpointManager, stop_requested: Callable[[], bool]
) -> None:
    """Release the run if all ranks were requested to stop, for example on suspend.

    If only some pods were, they are lost for another reason (such as a drained node): the run is
    not released and the next attempt counts as a restart. Kubelets signal the pods of a job within
    about a second of each other, so wait a little for the request to reach this rank.
    """
    deadline = time.monotonic() + _SIGNAL_SECONDS
    while not stop_requested() and time.monotonic() < deadline:
        time.sleep(0.05)
    if all(world.on_all(stop_requested)):
        checkpointer.release()
