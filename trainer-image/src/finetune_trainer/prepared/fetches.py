"""Fetches files in parallel, each once.

The samples of the first batches of a large set are in as many shards as there are samples. Fetched
one after the other, they would take as many round trips.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, Generic, TypeVar

AT_ONCE: Final = 8
"""Files fetched in parallel: bounds the memory of their parts."""

T = TypeVar("T")


class Fetches(Generic[T]):
    """Fetches by name. Thread-safe: requests for the same name share one fetch; a failed fetch is
    repeated by the next request.

    Args:
        fetch: fetches one item; called in threads of this object.
    """

    def __init__(self, fetch: Callable[[str], T], at_once: int = AT_ONCE) -> None:
        self._fetch = fetch
        self._lock = threading.Lock()
        self._asked: dict[str, Future[T]] = {}
        self._pool = ThreadPoolExecutor(at_once, thread_name_prefix="fetch")

    def ask(self, name: str) -> Future[T]:
        """Return the future of an item. Fetches start in the order of the requests."""
        with self._lock:
            found = self._asked.get(name)
            if found is None or (found.done() and found.exception() is not None):
                found = self._asked[name] = self._pool.submit(self._fetch, name)
            return found
