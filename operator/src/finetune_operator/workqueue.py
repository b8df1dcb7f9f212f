"""A de-duplicating queue of keys: one worker at a time per key, no key lost, backoff after errors.

A key rests after it was worked on, so that a burst of events about one job is one pass. Its first
time never waits, and comes before keys that were worked on before.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable
from typing import Final

FIRST_BACKOFF: Final = 0.2
LAST_BACKOFF: Final = 60.0
REST_SECONDS: Final = 1.0
"""Shortest time from the end of a pass to the next one over the same key."""


class WorkQueue:
    """Keys to work on. A key that is put while a worker has it, or while it rests, is worked on
    once more."""

    def __init__(self) -> None:
        self._ready: asyncio.PriorityQueue[tuple[bool, int, str]] = asyncio.PriorityQueue()
        self._serial = itertools.count()
        self._known: set[str] = set()
        """Keys that were worked on before."""
        self.new = 0
        """Number of keys that wait for their first time."""
        self._waiting: set[str] = set()
        self._busy: set[str] = set()
        """Keys that a worker has, or that rest."""
        self._again: set[str] = set()
        self._failures: dict[str, int] = {}
        self.longer_rest = 0.0
        """Seconds that keys rest longer than ``REST_SECONDS``: the longer, the more events one pass
        answers."""
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def __len__(self) -> int:
        return len(self._waiting) + len(self._again)

    def put(self, key: str) -> None:
        """Work on the key as soon as a worker is free and the key has rested."""
        if key in self._busy:
            self._again.add(key)
        elif key not in self._waiting:
            self._waiting.add(key)
            self.new += key not in self._known
            self._ready.put_nowait((key in self._known, next(self._serial), key))

    def put_after(self, key: str, seconds: float) -> None:
        """Work on the key after a delay; of several pending times the earliest counts."""
        loop = asyncio.get_running_loop()
        timer = self._timers.get(key)
        if timer is not None:
            if timer.when() <= loop.time() + seconds:
                return
            timer.cancel()
        self._timers[key] = loop.call_later(seconds, self._ring, key)

    def _ring(self, key: str) -> None:
        self._timers.pop(key, None)
        self.put(key)

    def forget(self, key: str) -> None:
        """Drop what is kept of a deleted key."""
        self._failures.pop(key, None)
        self._known.discard(key)
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()

    async def work(self, handle: Callable[[str], Awaitable[bool]]) -> None:
        """Run one worker until cancelled. ``handle`` returns whether it succeeded; a failed key is
        worked on again after a delay that doubles with each consecutive failure."""
        while True:
            known, _, key = await self._ready.get()
            self.new -= not known
            self._waiting.discard(key)
            self._busy.add(key)
            self._known.add(key)
            try:
                succeeded = await handle(key)
            finally:
                asyncio.get_running_loop().call_later(
                    REST_SECONDS + self.longer_rest, self._rested, key
                )
            if succeeded:
                self._failures.pop(key, None)
            else:
                count = self._failures[key] = self._failures.get(key, 0) + 1
                delay = min(FIRST_BACKOFF * 2.0 ** min(count - 1, 16), LAST_BACKOFF)
                self.put_after(key, delay * random.uniform(0.8, 1.2))

    def _rested(self, key: str) -> None:
        self._busy.discard(key)
        if key in self._again:
            self._again.discard(key)
            self.put(key)
