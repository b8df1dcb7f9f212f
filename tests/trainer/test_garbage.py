"""When garbage is collected while steps are taken."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from finetune_trainer.train.garbage import STEPS, collected_between_steps


class Cycle:
    """What only the collector finds."""

    def __init__(self) -> None:
        self.itself = self


@contextmanager
def collections() -> Iterator[list[int]]:
    """Generations that are collected."""
    seen: list[int] = []

    def note(phase: str, found: dict[str, int]) -> None:
        if phase == "start":
            seen.append(found["generation"])

    gc.callbacks.append(note)
    try:
        yield seen
    finally:
        gc.callbacks.remove(note)


def test_garbage_of_steps_is_collected_at_intervals_alone() -> None:
    with collected_between_steps() as after, collections() as seen:
        lost = weakref.ref(Cycle())
        for step in range(1, STEPS):
            kept = [[] for _ in range(1000)]  # enough for the collector to look, as it is set else
            after(step)
            assert kept and not seen and lost() is not None
        after(STEPS)
        assert seen == [2] and lost() is None


def test_what_was_there_before_is_not_looked_at() -> None:
    before = gc.get_threshold()
    with collected_between_steps():
        assert gc.get_freeze_count() > 10_000
        assert len(gc.get_objects()) < 10_000
    assert gc.get_freeze_count() == 0 and gc.get_threshold() == before


def test_an_error_leaves_the_collector_as_it_was() -> None:
    before = gc.get_threshold()
    with pytest.raises(KeyError), collected_between_steps():
        raise KeyError
    assert gc.get_freeze_count() == 0 and gc.get_threshold() == before
