"""Commits while training goes on: what is real stays real, wherever the process dies."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest
import torch
from engine import tiny_llama

from finetune_api.training import Training
from finetune_trainer.engine.gang import Gang, join
from finetune_trainer.failures import Fenced, StorageUnavailable, UserError
from finetune_trainer.storage import commitfiles
from finetune_trainer.storage.objects import ObjectStore, Stores
from finetune_trainer.storage.runfiles import ValidationPoint
from finetune_trainer.train.checkpoint import Checkpoints
from finetune_trainer.train.state import LoopState

T = TypeVar("T")
WRITES = ("put", "begin_parts", "put_part", "join_parts", "drop_parts", "delete")


class Died(BaseException):
    """The process is gone."""


class Mortal:
    """A store whose process dies at a write, before it is made or when it has been."""

    def __init__(self, store: ObjectStore, life: int, made: bool) -> None:
        self._store, self.life, self._made = store, life, made
        self._lock = threading.Lock()  # parts are written by several threads

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if name not in WRITES:
            return method

        def write(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                self.life -= 1
                left = self.life
            if left < -1 or (left == -1 and not self._made):
                raise Died
            answer = method(*arguments, **options)
            if left == -1:
                raise Died
            return answer

        return write


class Model:
    """A model whose weights tell the step that they are of."""

    def __init__(self, **shape: int) -> None:
        self.model = tiny_llama(**shape)
        self.optimizers = [torch.optim.AdamW(self.model.parameters(), lr=0.0)]
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizers[0].step()

    def set(self, step: int) -> LoopState:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(step)
        return LoopState(step=step)

    @property
    def values(self) -> set[float]:
        return {v for p in self.model.parameters() for v in p.detach().unique().tolist()}


@pytest.fixture(scope="module")
def gang() -> Gang:
    return join(Training.model_validate({"precision": "FP32"}))


PART = 5 << 20
"""The least that S3 takes."""
WIDE = {"hidden_size": 256, "intermediate_size": 512}
"""A state of three parts."""


@pytest.mark.parametrize("made", [False, True], ids=["before", "after"])
def test_a_death_at_any_write_leaves_a_whole_commit(
    gang: Gang, order_for: Any, tmp_path: Path, made: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts, their joining, small files, HEAD, and the removal of what is old."""
    monkeypatch.setattr(commitfiles, "PART_BYTES", PART)
    model, order = Model(**WIDE), order_for(run="1-death")
    store = Stores(order).default
    checkpoints = Checkpoints.take(gang, store, order, tmp_path)
    for step in (1, 2, 3):  # as many as are kept, and one
        checkpoints.commit(model.model, model.optimizers, model.set(step))
    checkpoints.settle()

    died, was = True, 3
    for life in itertools.count():
        step = 4 + life
        checkpoints = Checkpoints.take(gang, store, order, tmp_path)
        mortal: Any = Mortal(store, life, made)
        checkpoints.store = mortal
        checkpoints._held._store = mortal
        checkpoints.commit(model.model, model.optimizers, model.set(step))
        try:
            checkpoints.settle()
            died = False
        except Died:
            pass

        after = Checkpoints.take(gang, store, order, tmp_path)
        model.set(99)
        state = after.restore(model.model, model.optimizers)
        assert state is not None
        assert state.step in (was, step)
        assert model.values == {float(state.step)}, "weights and state are of one step"
        was = state.step
        if not died:
            assert state.step == step
            break
    assert life >= 9, "begun, three parts, joined, metadata, state, HEAD and a removal"
    assert list(store.open_parts(order.run_uri)) == [], "what died was removed"


@pytest.mark.parametrize("staging", ["Memory", "Disk"])
def test_training_goes_on_while_a_commit_is_uploaded(
    gang: Gang, order_for: Any, tmp_path: Path, staging: str
) -> None:
    """And the commit is of the moment in which it began."""
    model, order = Model(), order_for(run="1-async", checkpoint={"staging": staging})
    checkpoints = Checkpoints.take(gang, Stores(order).default, order, tmp_path)
    gate, put = threading.Event(), checkpoints.store.put

    def slow(uri: str, *arguments: Any, **options: Any) -> Any:
        assert gate.wait(30)
        return put(uri, *arguments, **options)

    checkpoints.store.put = slow  # type: ignore[method-assign]
    checkpoints.commit(model.model, model.optimizers, model.set(1))
    model.set(2)
    assert not checkpoints.settled()
    assert checkpoints.latest_uri is None
    gate.set()
    checkpoints.settle()
    assert str(checkpoints.latest_uri).endswith("attempt-1/step-00000001")
    state = checkpoints.restore(model.model, model.optimizers)
    assert state is not None
    assert (state.step, model.values) == (1, {1.0})


def test_a_copy_on_disk_holds_room_and_no_file(
    gang: Gang, order_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, order = Model(), order_for(run="1-disk", checkpoint={"staging": "Disk"})
    sizes: list[int] = []

    def reserve(descriptor: int, start: int, size: int) -> None:
        assert Path(f"/proc/self/fd/{descriptor}").readlink().parent == tmp_path
        if sizes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.truncate(descriptor, size)
        sizes.append(size)

    monkeypatch.setattr(os, "posix_fallocate", reserve)
    checkpoints = Checkpoints.take(gang, Stores(order).default, order, tmp_path)
    for step in (1, 2):  # the room is used again
        checkpoints.commit(model.model, model.optimizers, model.set(step))
    checkpoints.settle()
    trained = sum(p.numel() for p in model.model.parameters())
    assert sizes[0] == pytest.approx(12 * trained, rel=0.05)
    assert not list(tmp_path.iterdir())
    state = checkpoints.restore(model.model, model.optimizers)
    assert state is not None
    assert (state.step, model.values) == (2, {2.0})

    full = Checkpoints.take(gang, Stores(order).default, order, tmp_path)
    with pytest.raises(UserError, match=r"checkpoint\.staging: Memory") as caught:
        full.commit(model.model, model.optimizers, model.set(3))
    assert caught.value.reason == "ScratchFull"


def spoil(checkpoints: Checkpoints, number: int, name: str) -> None:
    """One byte in the middle of a file of a commit, the newest being 0."""
    uri = f"{checkpoints.head.commits[number].uri}/{name}"
    data = bytearray(checkpoints.store.get(uri))
    data[len(data) // 2] ^= 1
    checkpoints.store.put(uri, bytes(data))


@pytest.mark.parametrize("name", ["shard-00000", ".metadata", "state.json"])
def test_a_damaged_commit_is_left_and_the_one_before_is_read(
    gang: Gang, order_for: Any, tmp_path: Path, name: str
) -> None:
    model, order = Model(), order_for(run="1-damage")
    checkpoints = Checkpoints.take(gang, Stores(order).default, order, tmp_path)
    for step in (1, 2):
        checkpoints.commit(model.model, model.optimizers, model.set(step))
    checkpoints.settle()
    spoil(checkpoints, 0, name)
    model.set(99)
    state = checkpoints.restore(model.model, model.optimizers)
    assert state is not None
    assert (state.step, model.values) == (1, {1.0})
    assert [commit.step for commit in checkpoints.head.commits] == [1]

    spoil(checkpoints, 0, name)
    with pytest.raises(StorageUnavailable) as caught:
        checkpoints.restore(model.model, model.optimizers)
    assert caught.value.reason == "CommitsDamaged"
    again = Checkpoints.take(gang, Stores(order).default, order, tmp_path)
    assert again.restore(model.model, model.optimizers) is None, "the next attempt begins anew"


def test_damage_that_is_found_before_publishing_leaves_no_half_loaded_model(
    gang: Gang, order_for: Any, tmp_path: Path
) -> None:
    """The newest commit is of the step that the model is at, but the model is no longer what it
    was."""
    model, order = Model(), order_for(run="1-halfway")
    checkpoints = Checkpoints.take(gang, Stores(order).default, order, tmp_path)
    for step, loss in ((1, 0.5), (2, 0.9)):
        state = model.set(step)
        state.validation = [ValidationPoint(step=step, sets={}, overall={"Loss": loss})]
        checkpoints.commit(model.model, model.optimizers, state)
    checkpoints.settle()
    assert checkpoints.load_best(model.model, 2).step == 1
    assert model.values == {1.0}
    model.set(2)
    spoil(checkpoints, 1, "shard-00000")
    load = checkpoints._reader

    def halfway(commit: Any) -> Any:
        model.set(77)
        return load(commit)

    checkpoints._reader = halfway  # type: ignore[method-assign]
    assert checkpoints.load_best(model.model, 2).step == 2
    assert model.values == {2.0}


def test_the_gang_learns_of_whatever_file_could_not_be_written(
    gang: Gang, order_for: Any, tmp_path: Path
) -> None:
    """What the first process writes alone too: the others await its word."""

    class Telling(Gang):
        told: ClassVar[list[Exception]] = []

        def together(self, work: Callable[[], T]) -> list[T]:
            try:
                return super().together(work)
            except Exception as error:
                self.told.append(error)
                raise

    model, order = Model(), order_for(run="1-told")
    checkpoints = Checkpoints.take(gang, Stores(order).default, order, tmp_path)
    checkpoints.channel = Telling(gang.accelerator, gang.control)
    put, failure = checkpoints.store.put, StorageUnavailable("StorageUnreachable", "gone")

    def failing(uri: str, *arguments: Any, **options: Any) -> Any:
        if uri.endswith("/state.json"):
            raise failure
        return put(uri, *arguments, **options)

    checkpoints.store.put = failing  # type: ignore[method-assign]
    checkpoints.commit(model.model, model.optimizers, model.set(1))
    with pytest.raises(StorageUnavailable):
        checkpoints.settle()
    assert Telling.told == [failure]


def test_a_commit_that_was_fenced_is_told_by_the_next_word(
    gang: Gang, order_for: Any, tmp_path: Path
) -> None:
    model, order = Model(), order_for(run="1-fence")
    store = Stores(order).default
    stale = Checkpoints.take(gang, store, order, tmp_path / "stale")
    Checkpoints.take(gang, store, order, tmp_path / "newer")
    stale.commit(model.model, model.optimizers, model.set(1))
    with pytest.raises(Fenced):
        stale.settle()


def test_the_best_commits_are_kept_besides_the_newest(
    gang: Gang, order_for: Any, tmp_path: Path
) -> None:
    model = Model()
    order = order_for(run="1-best", checkpoint={"keepLast": 1, "keepBest": 2})
    checkpoints = Checkpoints.take(gang, Stores(order).default, order, tmp_path)
    for step, loss in enumerate([3.0, 1.0, 2.0, 1.0, 5.0], start=1):
        state = model.set(step)
        state.validation = [ValidationPoint(step=step, sets={}, overall={"Loss": loss})]
        checkpoints.commit(model.model, model.optimizers, state)
    checkpoints.settle()
    assert [c.step for c in checkpoints.head.commits] == [5, 4, 2]
    assert str(checkpoints.best_uri).endswith("step-00000004"), "of equals the newer one"
