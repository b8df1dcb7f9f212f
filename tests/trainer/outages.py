"""Storage that is away from a process for some of its requests; the server behind it is real.

A write is known by marks: parts of its address or, of HEAD's, of its text. The address of a
checkpoint ends with a quote there and with a slash in those of its objects.
"""

from __future__ import annotations

from typing import Any

from finetune_trainer.failures import StorageUnavailable, TrainerError
from finetune_trainer.storage.objects import ObjectStore

AWAY = StorageUnavailable("StorageUnreachable", "no answer")


def refuse_writes(*marks: str, times: int = 1, failure: TrainerError = AWAY) -> None:
    """So many writes that have a mark are not made from now on, for each of the marks."""
    put, left = ObjectStore.put, dict.fromkeys(marks, times)

    def refusing(store: ObjectStore, uri: str, data: bytes, **condition: Any) -> str:
        for mark in left:
            if left[mark] and _has(mark, uri, data):
                left[mark] -= 1
                raise type(failure)(failure.reason, f"{mark}: {failure.message}")
        return put(store, uri, data, **condition)

    ObjectStore.put = refusing  # type: ignore[method-assign]


def lose_answer(mark: str) -> None:
    """The first write of HEAD that has the mark is made, and no answer comes, nor is HEAD read
    until it is written again."""
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
