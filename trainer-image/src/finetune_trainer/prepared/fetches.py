"""Fetches files that a reader will need, several at a time, each once.

The first batches of a large set have samples of as many shards as they have samples: one after the
other, these would take as many round trips.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final, Generic, TypeVar

AT_ONCE: Final = 8
"""Files that are fetched at a time: storage answers in parallel, and memory holds their parts."""

T = TypeVar("T")


class Fetches(Generic[T]):
    """What was fetched by name. May be shared by threads: whoever asks for what another has asked
    for waits for the same fetch; what failed is fetched again when it is asked for again.

    Args:
        fetch: gets one of them; it is called in threads of this object, which hold up no exit of
            the process.
    """

    def __init__(self, fetch: Callable[[str], T], at_once: int = AT_ONCE) -> None:
        self._fetch, self._at_once = fetch, at_once
        self._lock = threading.Lock()
        self._asked: dict[str, Future[T]] = {}
        self._waiting: queue.SimpleQueue[tuple[str, Future[T]]] = queue.SimpleQueue()
        self._threads = 0

    def ask(self, name: str) -> Future[T]:
        """The thing of a name, now or soon; in the order in which they are asked for."""
        with self._lock:
            found = self._asked.get(name)
            if found is not None:
                return found
            future = self._asked[name] = Future()
            self._waiting.put((name, future))
            if self._threads < self._at_once:
                self._threads += 1
                threading.Thread(target=self._work, name="fetch", daemon=True).start()
            return future

    def _work(self) -> None:
        while True:
            name, future = self._waiting.get()
            try:
                future.set_result(self._fetch(name))
            except BaseException as error:
                with self._lock:
                    del self._asked[name]
                future.set_exception(error)
