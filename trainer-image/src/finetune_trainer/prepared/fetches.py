"""Fetches files that a reader will need, several at a time, each once.

The first batches of a large set have samples of as many shards as they have samples: one after the
other, these would take as many round trips.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, Generic, TypeVar

AT_ONCE: Final = 8
"""Files that are fetched at a time: storage answers in parallel, and memory holds their parts."""

T = TypeVar("T")


class Fetches(Generic[T]):
    """What was fetched by name. May be shared by threads: whoever asks for what another has asked
    for waits for the same fetch; what failed is fetched again when it is asked for again.

    Args:
        fetch: gets one of them; it is called in threads of this object.
    """

    def __init__(self, fetch: Callable[[str], T], at_once: int = AT_ONCE) -> None:
        self._fetch = fetch
        self._lock = threading.Lock()
        self._asked: dict[str, Future[T]] = {}
        self._pool = ThreadPoolExecutor(at_once, thread_name_prefix="fetch")

    def ask(self, name: str) -> Future[T]:
        """The thing of a name, now or soon; in the order in which they are asked for."""
        with self._lock:
            found = self._asked.get(name)
            if found is None or (found.done() and found.exception() is not None):
                found = self._asked[name] = self._pool.submit(self._fetch, name)
            return found
