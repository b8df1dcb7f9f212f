"""Python garbage collection between steps, at the same steps on all ranks.

An automatic full collection takes tenths of a second. It would run at different steps on each rank,
and all ranks wait for the slowest one. So objects that exist before the first step are frozen
(never scanned again), and garbage of the steps is collected explicitly every ``STEPS`` steps. The
thresholds for automatic collections are high: they run only if many objects are allocated between
steps, as in a long evaluation.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

STEPS: Final = 50
"""Steps between two explicit collections."""
_THRESHOLDS: Final = (100_000, 20, 20)
"""Arguments of ``gc.set_threshold``: net new objects before an automatic collection, then
collections of a generation before one of the next. A PyTorch step makes a few thousand objects."""


@contextmanager
def collected_between_steps() -> Iterator[Callable[[int], None]]:
    """Collect garbage only between steps, within this context. Yields a function to call after each
    step with the number of steps done; at multiples of ``STEPS`` it collects."""
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
