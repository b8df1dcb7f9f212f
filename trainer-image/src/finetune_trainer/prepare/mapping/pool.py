"""Processes that share the work of a pod, one a core, and give their results in order.

    items ─(at most a few at once)→ processes ─(in the order of the items)→ results

The executor is the standard library's. Its processes are forked off a server that has imported what
they need, so that they start in moments, share the memory of the imports, and never see the threads
of this process. A process that is killed is a named failure, not a wait without end.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from functools import partial
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any, Final, TypeVar

from finetune_trainer.failures import NodeFailure, OutOfMemory, TrainerError
from finetune_trainer.memory_limit import count_oom_kills, memory_limit
from finetune_trainer.threads import count_cores

PROCESS_BYTES: Final = 256 << 20
"""Memory that a process is counted with."""

WORTH_BYTES: Final = 4 << 20
"""Data that is worth another process: about the work that takes as long as to start it."""

K = TypeVar("K")
T = TypeVar("T")
R = TypeVar("R")


def count_processes(data_bytes: int) -> int:
    """How many processes prepare so much data: one a core, as far as there is memory and work."""
    limit = memory_limit()
    room = max(1, limit // PROCESS_BYTES - 2) if limit else count_cores()
    return max(1, min(count_cores(), room, -(-data_bytes // WORTH_BYTES)))


class Pool:
    """A number of processes; of one, the work is done in this process. A context manager.

    Args:
        processes: how many.
        begin: is called once in each of them before all else, with ``given``.
        given: what the work needs and does not change.

    Raises (leaving the context):
        OutOfMemory: 'ProcessKilled' where the kernel has killed a process for want of memory.
        NodeFailure: 'ProcessLost' where a process ended otherwise.
    """

    def __init__(self, processes: int, begin: Callable[[Any], None], given: Any) -> None:
        self.processes = processes
        self._executor: ProcessPoolExecutor | None = None
        self._killed = count_oom_kills()
        if processes == 1:
            begin(given)
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([begin.__module__])
        self._executor = ProcessPoolExecutor(processes, context, _begin, (begin, given))

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
        if isinstance(error, BrokenExecutor):
            raise self._lost() from None

    def in_order(
        self, work: Callable[[T], R], items: Iterable[tuple[K, T]]
    ) -> Iterator[tuple[K, Callable[[], R]]]:
        """The key of each item with what gives its result, or raises what the work raised. Items
        are taken as there is room, so that memory holds a few; those after the one where the caller
        stops are given up.

        Args:
            items: key and argument of each; keys stay in this process.
        """
        if self._executor is None:
            for key, item in items:
                yield key, partial(work, item)
            return
        waiting: deque[tuple[K, Future[R]]] = deque()
        try:
            for key, item in items:
                waiting.append((key, self._executor.submit(work, item)))
                if len(waiting) > 2 * self.processes:
                    first, future = waiting.popleft()
                    yield first, future.result
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result
        finally:
            for _, future in waiting:
                future.cancel()

    def _lost(self) -> TrainerError:
        if count_oom_kills() > self._killed:
            return OutOfMemory(
                "ProcessKilled",
                f"one of {self.processes} processes of prepare was killed: the pod's memory does"
                " not suffice. Raise prepare.resources.limits.memory, or lower its cpu: a process"
                " is started for each core",
            )
        return NodeFailure(
            "ProcessLost",
            f"one of {self.processes} processes of prepare was killed from outside, or crashed."
            " What was written is kept; the next try goes on from there",
        )


def _begin(begin: Callable[[Any], None], given: Any) -> None:
    """The first thing that a process of the pool does."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core
    os.environ["OMP_NUM_THREADS"] = "1"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    begin(given)


def _end_with_parent() -> None:
    """A process whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
