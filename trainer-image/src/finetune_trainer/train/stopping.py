"""How an attempt is stopped: heard by all processes together, where nothing is half done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from finetune_trainer.engine.world import World
from finetune_trainer.failures import Interrupted
from finetune_trainer.train.checkpoint import CheckpointManager

_TELLING_SECONDS: Final = 3.0


def raise_if_stopping(world: World, stop_requested: Callable[[], bool], where: str) -> None:
    """Stop here where a process was asked to; nothing is unsaved.

    Raises:
        Interrupted: on all ranks together.
    """
    if any(world.on_all(stop_requested)):
        raise Interrupted("Interrupted", f"stopped as asked, {where}")


@contextmanager
def releasing(
    world: World, checkpointer: CheckpointManager, stop_requested: Callable[[], bool]
) -> Iterator[None]:
    """End the attempt in good order where it was interrupted: what there was to save is saved."""
    try:
        yield
    except Interrupted:
        _end_attempt(world, checkpointer, stop_requested)
        raise


def _end_attempt(
    world: World, checkpointer: CheckpointManager, stop_requested: Callable[[], bool]
) -> None:
    """Release the run where the whole gang was told to stop (suspended, say).

    Where only some of its pods were told, the gang has lost them to something else: the state is
    saved, but the next attempt counts as a restart. Kubelets tell their pods within a second or
    so of each other.
    """
    deadline = time.monotonic() + _TELLING_SECONDS
    while not stop_requested() and time.monotonic() < deadline:
        time.sleep(0.05)
    if all(world.on_all(stop_requested)):
        checkpointer.release()
