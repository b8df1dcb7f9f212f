"""Garbage collection between steps."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from finetune_trainer.train.garbage import STEPS, collected_between_steps


class Cycle:
    """A reference cycle, which only the garbage collector frees."""

    def __init__(self) -> None:
        self.itself = self


@contextmanager
def collections() -> Iterator[list[int]]:
    """Record the generation of each collection."""
    seen: list[int] = []

    def note(phase: str, found: dict[str, int]) -> None:
        if phase == "start":
            seen.append(found["generation"])

    gc.callbacks.append(note)
    try:
        yield seen
    finally:
        gc.callbacks.remove(note)


def test_garbage_is_collected_only_at_intervals() -> None:
    with collected_between_steps() as after, collections() as seen:
        lost = weakref.ref(Cycle())
        for step in range(1, STEPS):
            kept = [[] for _ in range(1000)]  # would trigger a collection at the default thresholds
            after(step)
            assert kept and not seen and lost() is not None
        after(STEPS)
        assert seen == [2] and lost() is None


def test_objects_from_before_the_steps_are_frozen() -> None:
    before = gc.get_threshold()
    with collected_between_steps():
        assert gc.get_freeze_count() > 10_000
        assert len(gc.get_objects()) < 10_000
    assert gc.get_freeze_count() == 0 and gc.get_threshold() == before


def test_an_error_restores_the_collector_settings() -> None:
    before = gc.get_threshold()
    with pytest.raises(KeyError), collected_between_steps():
        raise KeyError
    assert gc.get_freeze_count() == 0 and gc.get_threshold() == before
