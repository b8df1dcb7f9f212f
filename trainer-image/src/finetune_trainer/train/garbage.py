"""Garbage collection between steps, not within them.

Python's collector looks through all objects whenever enough new ones were made: for tenths of a
second, at another step in each process, and in a gang all wait for the one that does. So what is
there before the first step is never looked at again, and what steps leave behind is looked at every
few steps, at the same ones in all processes. By itself the collector looks only where very much is
made without steps, as in a long evaluation.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

STEPS: Final = 50
"""Steps between two collections."""
_THRESHOLDS: Final = (100_000, 20, 20)
"""New objects before the collector looks at these by itself, and how often it looks further back;
PyTorch makes some thousand Python objects in a step."""


@contextmanager
def collected_between_steps() -> Iterator[Callable[[int], None]]:
    """Within it, garbage is collected when what is yielded is told of a step done whose number is a
    multiple of ``STEPS``."""
    thresholds = gc.get_threshold()
    gc.set_threshold(*_THRESHOLDS)
    gc.collect()
    gc.freeze()

    def after(step: int) -> None:
        if step % STEPS == 0:
            gc.collect()

    try:
        yield after
    finally:
        gc.unfreeze()
        gc.set_threshold(*thresholds)
