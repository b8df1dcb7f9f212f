"""OpenMP threads that spin at barriers while cores are free, and sleep while other processes need
the cores.

On an idle machine, waking sleeping threads costs a quarter of the speed of a small model. Beside a
busy process, spinning threads take CPU time from the thread that they wait for, which costs three
quarters. So a thread watches how long the threads of this process wait for a core, and switches.

libgomp, the OpenMP of PyTorch's wheels, reads its wait policy only when it is loaded. But it spins
only briefly while a process has more OpenMP threads than CPUs (GNU libgomp manual, GOMP_SPINCOUNT).
So a second team of threads, which does nothing, makes all threads sleep; its end makes them spin
again. The number of threads that compute stays the same, and therefore every sum of floating-point
numbers: the load of the machine never changes a result.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from finetune_trainer.background import BackgroundThread

_TASKS: Final = Path("/proc/self/task")
_MAPS: Final = Path("/proc/self/maps")
_INTERVAL: Final = 0.25
"""Seconds between two looks at the threads."""
_CONTENDED: Final = 0.3
"""Threads that wait for a core, on average, from which on sleeping is faster than spinning. Beside
one busy core 0.5 to 1 wait while they spin; on an idle machine, seldom more than 0.1."""
_FREE: Final = 0.15
"""Below this, no other process needs the cores. Beside one busy core, 0.3 to 0.7 threads wait for a
core although the waiting ones sleep."""
_CALM_INTERVALS: Final = 4
"""Intervals below ``_FREE`` in a row before the threads spin again."""


def can_adapt() -> bool:
    """Whether the system tells how long threads wait for a core: Linux with scheduler
    statistics."""
    return Path("/proc/self/schedstat").exists()


class SpinDecision:
    """Whether threads should spin, from how many of them waited for a core."""

    def __init__(self) -> None:
        self.spins = True
        self._calm = 0

    def update(self, waiting: float) -> bool:
        """Return whether to spin from now on.

        Args:
            waiting: threads that waited for a core in the last interval, on average.
        """
        if self.spins:
            self.spins, self._calm = waiting < _CONTENDED, 0
        else:
            self._calm = self._calm + 1 if waiting < _FREE else 0
            self.spins = self._calm >= _CALM_INTERVALS
        return self.spins


class AdaptiveSpinning(BackgroundThread):
    """Context manager: adapts how the OpenMP threads of this process wait."""

    def __init__(self) -> None:
        super().__init__("spinning")
        self._cores = len(os.sched_getaffinity(0))

    def run(self) -> None:
        decision = SpinDecision()
        second_team: SecondTeam | None = None
        before, at = _run_queue_seconds(), time.perf_counter()
        while not self.ended.wait(_INTERVAL):
            now, later = _run_queue_seconds(), time.perf_counter()
            waited = sum(s - before[task] for task, s in now.items() if task in before)
            spins = decision.update(waited / (later - at))
            before, at = now, later
            if not spins and second_team is None:
                second_team = SecondTeam(self._cores)
            elif spins and second_team is not None:
                second_team.end()
                second_team = None
        if second_team is not None:
            second_team.end()


class SecondTeam:
    """A team of OpenMP threads that sleep until ``end``."""

    def __init__(self, size: int) -> None:
        """
        Args:
            size: threads; with as many as there are cores, the process has more threads than cores.
        """
        self._size = size
        self._started, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._hold, name="second-team", daemon=True)
        self._thread.start()
        self._started.wait()

    def end(self) -> None:
        """End the threads; returns when they have ended."""
        self._ended.set()
        self._thread.join()

    def _hold(self) -> None:
        try:
            no_operation = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)  # free(NULL)
            for path in _loaded_libgomps():
                ctypes.CDLL(path).GOMP_parallel(no_operation, None, self._size, 0)
        finally:
            self._started.set()
        self._ended.wait()


def _loaded_libgomps() -> set[str]:
    """Return the paths of the copies of libgomp in this process."""
    columns = (line.split(maxsplit=5) for line in _MAPS.read_text().splitlines())
    return {c[5] for c in columns if len(c) == 6 and "libgomp" in Path(c[5]).name}


def _run_queue_seconds() -> dict[str, float]:
    """Return the time that each thread of this process has waited for a core, in seconds, by thread
    id."""
    found = {}
    for task in _TASKS.iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            found[task.name] = int((task / "schedstat").read_text().split()[1]) / 1e9
    return found
