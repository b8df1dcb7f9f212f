"""Commits while training goes on: what is real stays real, wherever the process dies."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import tiny_llama

from finetune_api.spec import Training
from finetune_trainer.engine.gang import Gang, join
from finetune_trainer.failures import Fenced
from finetune_trainer.storage.objects import ObjectStore, Stores
from finetune_trainer.storage.runfiles import ValidationPoint
from finetune_trainer.train.checkpoint import Checkpoints
from finetune_trainer.train.state import LoopState

WRITES = ("put", "upload", "delete")


class Died(BaseException):
    """The process is gone."""


class Mortal:
    """A store whose process dies at a write, before it is made or when it has been."""

    def __init__(self, store: ObjectStore, life: int, made: bool) -> None:
        self._store, self.life, self._made = store, life, made

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if name not in WRITES:
            return method

        def write(*arguments: Any, **options: Any) -> Any:
            self.life -= 1
            if self.life < 0 and not self._made:
                raise Died
            answer = method(*arguments, **options)
            if self.life < 0:
                raise Died
            return answer

        return write


class Model:
    """A model whose weights tell the step that they are of."""

    def __init__(self) -> None:
        self.model = tiny_llama()
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
        return {v for p in self.model.parameters() for v in p.detach().flatten().tolist()}


@pytest.fixture(scope="module")
def gang() -> Gang:
    return join(Training.model_validate({"precision": "FP32"}))


@pytest.mark.parametrize("made", [False, True], ids=["before", "after"])
def test_a_death_at_any_write_leaves_a_whole_commit(
    gang: Gang, order_for: Any, tmp_path: Path, made: bool
) -> None:
    model = Model()
    for life in itertools.count():
        order = order_for(run=f"{life + 1}-death")
        store = Stores(order).default
        checkpoints = Checkpoints.take(gang, store, order, tmp_path / "before")
        for step in (1, 2, 3):  # as many as are kept, and one
            checkpoints.commit(model.model, model.optimizers, model.set(step))
        checkpoints.settle()

        mortal: Any = Mortal(store, life, made)
        checkpoints.store = mortal
        checkpoints._held._store = mortal
        checkpoints.commit(model.model, model.optimizers, model.set(4))
        died = False
        try:
            checkpoints.settle()
        except Died:
            died = True

        after = Checkpoints.take(gang, store, order, tmp_path / "after")
        model.set(99)
        state = after.restore(model.model, model.optimizers)
        assert state is not None
        assert state.step in (3, 4)
        assert model.values == {float(state.step)}, "weights and state are of one step"
        if not died:
            assert state.step == 4
            break
    assert life >= 3, "shard, state and HEAD are three writes at least"


def test_training_goes_on_while_a_commit_is_uploaded(
    gang: Gang, order_for: Any, tmp_path: Path
) -> None:
    """And the commit is of the moment in which it began."""
    model, order = Model(), order_for(run="1-async")
    checkpoints = Checkpoints.take(gang, Stores(order).default, order, tmp_path)
    gate, upload = threading.Event(), checkpoints.store.upload

    def slow(*arguments: Any) -> Any:
        assert gate.wait(30)
        return upload(*arguments)

    checkpoints.store.upload = slow  # type: ignore[method-assign]
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
