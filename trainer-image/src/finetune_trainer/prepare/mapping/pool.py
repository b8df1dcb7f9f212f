"""A process pool, one process per core, that returns results in the order of the items.

    items ─(at most a few in flight)→ processes ─(in the order of the items)→ results

The pool is a ``ProcessPoolExecutor`` with a fork server that has imported the modules of the work.
Processes therefore start fast, share the memory of the imports, and do not inherit the threads of
this process. A killed process raises a named failure instead of a hang.
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
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Final, TypeVar

from finetune_trainer.failures import HostOutOfMemory, NodeFailure, TrainerError
from finetune_trainer.liveness import progressed
from finetune_trainer.memory_limit import count_oom_kills, memory_limit
from finetune_trainer.prepare.rendering.limits import KILLED_BY, SECONDS, too_costly
from finetune_trainer.threads import count_cores

PROCESS_BYTES: Final = 256 << 20
"""Memory assumed per process."""

WORTH_BYTES: Final = 4 << 20
"""Data per process: below this, starting a process takes longer than its work."""

K = TypeVar("K")
T = TypeVar("T")
R = TypeVar("R")


def count_processes(data_bytes: int) -> int:
    """Return the number of processes: one per core, limited by memory and by the amount of data."""
    limit = memory_limit()
    room = max(1, limit // PROCESS_BYTES - 2) if limit else count_cores()
    return max(1, min(count_cores(), room, -(-data_bytes // WORTH_BYTES)))


class Pool:
    """A pool of processes, as a context manager. With one process, work runs in this process.

    Args:
        processes: number of processes.
        begin: called once in each process before any work, with ``given``.
        given: constant input of the work.

    Raises (on exit of the context):
        HostOutOfMemory: the kernel's OOM killer ended a process.
        UserError: 'TemplateTooCostly', a template exceeded its time in one operation.
        NodeFailure: 'ProcessLost', a process ended for another reason.
    """

    def __init__(self, processes: int, begin: Callable[[Any], None], given: Any) -> None:
        self.processes = processes
        self._executor: ProcessPoolExecutor | None = None
        self._killed = count_oom_kills()
        self._children: list[BaseProcess] = []
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
        """Yield the key of each item with a function that returns its result or raises its error.
        At most ``2 * processes + 1`` items are in flight, to bound memory. Items that remain when
        the caller stops are cancelled.

        Args:
            items: key and argument of each; keys stay in this process.
        """
        if self._executor is None:
            for key, item in items:
                yield key, partial(_result, partial(work, item))
            return
        waiting: deque[tuple[K, Future[R]]] = deque()
        try:
            for key, item in items:
                waiting.append((key, self._executor.submit(work, item)))
                self._children = self._children or multiprocessing.active_children()
                if len(waiting) > 2 * self.processes:
                    first, future = waiting.popleft()
                    yield first, partial(_result, future.result)
            while waiting:
                first, future = waiting.popleft()
                yield first, partial(_result, future.result)
        finally:
            for _, future in waiting:
                future.cancel()

    def _lost(self) -> TrainerError:
        if count_oom_kills() > self._killed:
            return HostOutOfMemory(
                "HostOutOfMemory",
                f"one of {self.processes} processes of prepare was killed: the pod is out of"
                " memory. Raise prepare.resources.limits.memory, or lower its cpu: one process"
                " is started per core",
            )
        if any(child.exitcode == -KILLED_BY for child in self._children):
            return too_costly("a record", f"takes more than {SECONDS} s in one operation")
        return NodeFailure(
            "ProcessLost",
            f"one of {self.processes} processes of prepare was killed from outside, or crashed."
            " Finished input splits are kept; the next attempt continues from there",
        )


def _result(get: Callable[[], R]) -> R:
    """Return the result of an item, which is a sign of progress of the stage."""
    result = get()
    progressed()
    return result


def _begin(begin: Callable[[Any], None], given: Any) -> None:
    """Initialize a process of the pool."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the pool has one process per core
    os.environ["OMP_NUM_THREADS"] = "1"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    begin(given)


def _end_with_parent() -> None:
    """Exit when the parent ends: a process would wait for work forever if its parent was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
