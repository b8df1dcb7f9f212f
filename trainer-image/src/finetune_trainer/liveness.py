"""Signs of progress of a training process, and the end of a process that shows none.

A hung collective, a stopped peer or a blocked read of storage raises no error for many minutes, or
never, while the whole gang holds its GPUs. So each piece of work (a micro-batch, a batch of an
evaluation, a part of a checkpoint or of the weights) calls ``progressed``, and a thread ends the
process if no sign came for too long. The other processes lose a peer then, or notice the stall
themselves, and the supervisors start all of them again.
"""

from __future__ import annotations

import faulthandler
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from finetune_trainer.background import BackgroundThread

LEAST_SECONDS: Final = 900.0
"""Shortest default limit."""
START_SECONDS: Final = 3600.0
"""Default limit before the first step: large models load, and blocks compile, without a sign."""
TIMES_LONGEST: Final = 20
"""Default limit in multiples of the longest time between two signs so far."""
STOPPING_SECONDS: Final = 60.0
"""Shortest limit once the process was requested to stop: a rank that waits for a lost one would
hold its GPU for the rest of the grace period, which may be an hour."""
STOPPING_TIMES_LONGEST: Final = 3
_LOOKS: Final = 20
"""Looks within a limit."""
_LOOK_SECONDS: Final = 5.0
"""Longest time between two looks."""
_GIVE_UP: Final = 60.0
"""Seconds after which native code that holds Python's lock is ended too."""


class _Signs:
    """The signs of this process."""

    def __init__(self) -> None:
        self.last = time.monotonic()
        self.longest = 0.0
        self.stepped = False


_signs = _Signs()


def progressed() -> None:
    """Note that this process has done a piece of work. Cheap; any thread may call it."""
    now = time.monotonic()
    _signs.longest = max(_signs.longest, now - _signs.last)
    _signs.last = now


def idle_seconds() -> float:
    """Return the seconds since the last sign of progress."""
    return time.monotonic() - _signs.last


def stepped() -> None:
    """Note the end of an optimizer step: the startup, and its longer limit, is over."""
    if not _signs.stepped:
        _signs.stepped, _signs.longest = True, 0.0
    progressed()


def stall_limit(
    asked: float | None, longest: float, started: bool, stopping: bool = False
) -> float:
    """Return the seconds without a sign after which a process has stalled.

    Args:
        asked: ``failurePolicy.progressDeadlineSeconds``; None: the default.
        longest: longest time between two signs since the first step.
        started: whether a step was made.
        stopping: whether the process was requested to stop.
    """
    limit = asked
    if limit is None:
        limit = max(LEAST_SECONDS if started else START_SECONDS, TIMES_LONGEST * longest)
    if stopping:
        limit = min(limit, max(STOPPING_SECONDS, STOPPING_TIMES_LONGEST * longest))
    return limit


class StallWatch(BackgroundThread):
    """Context manager: calls ``on_stall`` from a thread once the process has stalled."""

    def __init__(
        self,
        asked: float | None,
        stacks: Path,
        on_stall: Callable[[float, Path], None],
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            asked: as for ``stall_limit``.
            stacks: file for the stacks of all threads.
            on_stall: called with the seconds without a sign and that file; ends the process.
            stop_requested: whether this process was requested to stop.
        """
        super().__init__("stall-watch")
        self._asked, self._stacks, self._on_stall = asked, stacks, on_stall
        self._stop_requested = stop_requested

    def run(self) -> None:
        """Look for signs until the context ends."""
        global _signs
        _signs = _Signs()
        try:
            while self._has_signs():
                pass
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _has_signs(self) -> bool:
        """Wait until the next look; return whether to go on."""
        limit = stall_limit(
            self._asked, _signs.longest, _signs.stepped, stopping=self._stop_requested()
        )
        # If native code holds Python's lock, this thread cannot run: faulthandler's needs none.
        faulthandler.dump_traceback_later(limit + _GIVE_UP, exit=True)
        pause, began = min(limit / _LOOKS, _LOOK_SECONDS), time.monotonic()
        if self.ended.wait(pause):
            return False
        now = time.monotonic()
        if now - began > 2 * pause + 1:  # the whole process was stopped, and goes on
            _signs.last = now
        idle = now - _signs.last
        if idle < limit:
            return True
        with suppress(OSError), self._stacks.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        self._on_stall(idle, self._stacks)
        return False
