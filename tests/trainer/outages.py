"""Storage outages for some requests of a process, in front of a real server.

A mark selects writes: a part of an object's URI or, for HEAD, of its text. The URI of a checkpoint
is followed by a quote in HEAD, and by a slash in the URIs of its files.
"""

from __future__ import annotations

from typing import Any

from finetune_trainer.failures import StorageUnavailable, TrainerError
from finetune_trainer.storage.objects import ObjectStore

AWAY = StorageUnavailable("StorageUnreachable", "no answer")


def refuse_writes(*marks: str, times: int = 1, failure: TrainerError = AWAY) -> None:
    """Fail the next ``times`` writes that match a mark, for each mark."""
    put, left = ObjectStore.put, dict.fromkeys(marks, times)

    def refusing(store: ObjectStore, uri: str, data: bytes, **condition: Any) -> str:
        for mark in left:
            if left[mark] and _has(mark, uri, data):
                left[mark] -= 1
                raise type(failure)(failure.reason, f"{mark}: {failure.message}")
        return put(store, uri, data, **condition)

    ObjectStore.put = refusing  # type: ignore[method-assign]


def lose_answer(mark: str) -> None:
    """Lose the response of the first HEAD write that matches the mark: it is made, but raises.
    Reads of HEAD fail until it is written again."""
    put, get_tagged = ObjectStore.put, ObjectStore.get_tagged
    lost = away = False

    def losing(store: ObjectStore, uri: str, data: bytes, **condition: Any) -> str:
        nonlocal lost, away
        if not uri.endswith("/HEAD.json"):
            return put(store, uri, data, **condition)
        away = False
        etag = put(store, uri, data, **condition)
        if not lost and _has(mark, uri, data):
            lost = away = True
            raise AWAY
        return etag

    def reading(store: ObjectStore, uri: str) -> tuple[bytes, str]:
        if away and uri.endswith("/HEAD.json"):
            raise AWAY
        return get_tagged(store, uri)

    ObjectStore.put = losing  # type: ignore[method-assign]
    ObjectStore.get_tagged = reading  # type: ignore[method-assign]


def _has(mark: str, uri: str, data: bytes) -> bool:
    return mark in uri or (uri.endswith("/HEAD.json") and mark in data.decode())
