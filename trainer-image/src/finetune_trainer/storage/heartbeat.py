"""``heartbeat.json``: the last sign of life of the attempt that owns a run.

A killed attempt cannot record its end; the next attempt, perhaps days later, must know how long the
killed one held its nodes. So rank 0 writes a heartbeat once a minute. The file only serves the
statistics: ownership is decided by HEAD alone.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from typing import Final

from pydantic import ValidationError

from finetune_api.base import Record
from finetune_api.time_use import TimeUse
from finetune_trainer.background import BackgroundThread
from finetune_trainer.failures import TrainerError
from finetune_trainer.storage.objects import ObjectNotFound, ObjectStore

BEAT_SECONDS: Final = 60.0
log = logging.getLogger(__name__)


class HeartbeatRecord(Record):
    """``heartbeat.json``."""

    attempt: int
    """Attempt that wrote it."""
    time: float
    """Unix time in seconds."""
    use: TimeUse | None = None
    """How the attempts have spent their time."""


def read_heartbeat(store: ObjectStore, run_uri: str, attempt: int) -> HeartbeatRecord | None:
    """Return the last heartbeat of an attempt, if any."""
    try:
        seen = HeartbeatRecord.model_validate_json(store.get(f"{run_uri}/heartbeat.json"))
    except (ObjectNotFound, ValidationError):
        return None
    return seen if seen.attempt == attempt else None


def latest_end(seen: HeartbeatRecord | None, known: float, now: float) -> float:
    """Return the latest time at which an unreleased attempt ended: ``BEAT_SECONDS`` after its last
    sign of life.

    Args:
        seen: its last heartbeat.
        known: last sign of life in HEAD; Unix time like all times here.
    """
    last = max(known, seen.time) if seen is not None else known
    return max(known, min(now, last + BEAT_SECONDS))


class Heartbeat(BackgroundThread):
    """Writes heartbeats of an attempt in a thread while the context lasts."""

    def __init__(
        self, store: ObjectStore, run_uri: str, attempt: int,
        clock: Callable[[], float] = time.time, use: Callable[[], TimeUse | None] = lambda: None,
    ) -> None:  # fmt: skip
        self._store, self._uri = store, f"{run_uri}/heartbeat.json"
        self._attempt, self._clock, self._use = attempt, clock, use
        super().__init__("heartbeat")

    def run(self) -> None:
        while not self.ended.wait(BEAT_SECONDS):
            self.beat()

    def beat(self) -> None:
        """Write one heartbeat. A storage failure is logged: only a statistic is lost."""
        seen = HeartbeatRecord(attempt=self._attempt, time=self._clock(), use=self._use())
        try:
            self._store.put(self._uri, json.dumps(seen.to_json()).encode())
        except TrainerError as error:
            log.info("heartbeat of attempt %d not written: %s", self._attempt, error)
