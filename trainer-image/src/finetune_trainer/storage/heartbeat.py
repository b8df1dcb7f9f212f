"""``heartbeat.json``: when the attempt that owns a run last showed that it lives.

An attempt that is killed says nothing; the one that follows, perhaps days later, must know until
when it held its nodes. So the gang's first process says once a minute that it is there. The file
decides nothing: HEAD alone says who owns the run.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from pydantic import ValidationError

from finetune_api.base import Record
from finetune_trainer.failures import TrainerError
from finetune_trainer.storage.objects import ObjectNotFound, ObjectStore

BEAT_SECONDS: Final = 60.0
log = logging.getLogger(__name__)


class HeartbeatRecord(Record):
    """``heartbeat.json``."""

    attempt: int
    """Attempt that wrote it."""
    time: float
    """Unix time."""


def last_heartbeat(
    store: ObjectStore, run_uri: str, attempt: int, known: float, now: float
) -> float:
    """When an attempt that did not say so has ended, at the latest: a beat after its last sign.

    Args:
        known: last sign of it in HEAD, Unix time as all others.
    """
    try:
        seen = HeartbeatRecord.model_validate_json(store.get(f"{run_uri}/heartbeat.json"))
        last = max(known, seen.time) if seen.attempt == attempt else known
    except (ObjectNotFound, ValidationError):
        last = known
    return max(known, min(now, last + BEAT_SECONDS))


class Heartbeat:
    """Says in a thread that an attempt lives, for as long as the context lasts."""

    def __init__(
        self, store: ObjectStore, run_uri: str, attempt: int,
        clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._store, self._uri = store, f"{run_uri}/heartbeat.json"
        self._attempt, self._clock = attempt, clock
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._over.set()

    def _run(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            self.beat()

    def beat(self) -> None:
        """Say it once. A figure is all that is lost where storage fails."""
        seen = HeartbeatRecord(attempt=self._attempt, time=self._clock())
        try:
            self._store.put(self._uri, json.dumps(seen.to_json()).encode())
        except TrainerError as error:
            log.info("not said that attempt %d lives: %s", self._attempt, error)
