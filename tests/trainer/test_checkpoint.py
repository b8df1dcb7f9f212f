"""Checkpoints during training: committed checkpoints stay intact wherever the process dies."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest
import torch
from engine import spec_of, tiny_llama

from finetune_trainer.engine.world import World, join
from finetune_trainer.failures import Fenced, StorageUnavailable, UserError
from finetune_trainer.storage import checkpoint_files
from finetune_trainer.storage.objects import ObjectStore, Stores
from finetune_trainer.storage.runfiles import ValidationPoint
from finetune_trainer.train.checkpoint import CheckpointManager
from finetune_trainer.train.state import LoopState

T = TypeVar("T")
WRITES = ("put", "begin_parts", "put_part", "join_parts", "drop_parts", "delete")


class Died(BaseException):
    """Simulated death of the process."""


class Mortal:
    """Object store that kills its process at the write after ``life`` others; ``made``: whether
    that write is still done."""

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
    """A model whose weights all equal the step."""

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
def world() -> World:
    return join(spec_of({"type": "Full"}, precision="FP32"))


PART = 5 << 20
"""Minimum part size of S3."""
WIDE = {"hidden_size": 256, "intermediate_size": 512}
"""Model shape whose state takes three parts."""


@pytest.mark.parametrize("made", [False, True], ids=["before", "after"])
def test_death_at_any_write_leaves_a_complete_checkpoint(
    world: World, run_spec_for: Any, tmp_path: Path, made: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writes: parts, their completion, small files, HEAD, and the removal of old checkpoints."""
    monkeypatch.setattr(checkpoint_files, "PART_BYTES", PART)
    model, run_spec = Model(**WIDE), run_spec_for(run="1-death")
    store = Stores(run_spec).default
    checkpointer = CheckpointManager.take(world, store, run_spec, tmp_path)
    for step in (1, 2, 3):  # one more than are kept
        checkpointer.save(model.model, model.optimizers, model.set(step))
    checkpointer.settle()

    died, was = True, 3
    for life in itertools.count():
        step = 4 + life
        checkpointer = CheckpointManager.take(world, store, run_spec, tmp_path)
        mortal: Any = Mortal(store, life, made)
        checkpointer.store = mortal
        checkpointer._held._store = mortal
        checkpointer.save(model.model, model.optimizers, model.set(step))
        try:
            checkpointer.settle()
            died = False
        except Died:
            pass

        after = CheckpointManager.take(world, store, run_spec, tmp_path)
        model.set(99)
        state = after.restore(model.model, model.optimizers)
        assert state is not None
        assert state.step in (was, step)
        assert model.values == {float(state.step)}, "weights and state are of one step"
        was = state.step
        if not died:
            assert state.step == step
            break
    assert life >= 9, "begin, three parts, join, metadata, state, HEAD and a removal"
    assert list(store.open_parts(run_spec.run_uri)) == [], "parts of dead uploads are removed"


def test_a_point_is_beside_the_checkpoints(world: World, run_spec_for: Any, tmp_path: Path) -> None:
    """Its weights are loaded on request; training goes on from checkpoints only."""
    model, run_spec = Model(), run_spec_for(run="1-point")
    store = Stores(run_spec).default

    def attempt() -> CheckpointManager:
        return CheckpointManager.take(world, store, run_spec, tmp_path)

    def files() -> set[str]:
        listed = store.list(f"{run_spec.run_uri}/")
        return {info.uri.rpartition("/")[0].rpartition("/")[2] for info in listed}

    checkpointer = attempt()
    for step in (1, 2):
        checkpointer.save(model.model, model.optimizers, model.set(step))
    checkpointer.settle()
    first, source = checkpointer.head.checkpoints[::-1]
    model.set(7)
    point = checkpointer.save_point(model.model, source, "why")
    assert point.uri.endswith("attempt-1/point-00000002") and point in checkpointer.head.named

    resumed = attempt()
    state = resumed.restore(model.model, model.optimizers)
    assert state is not None and (state.step, model.values) == (2, {2.0})
    assert resumed.load_point(model.model, first) is None
    assert resumed.load_point(model.model, source) == (point, "why")
    assert model.values == {7.0}

    # A point of the next attempt replaces it, also where that attempt writes no checkpoint.
    model.set(8)
    again = resumed.save_point(model.model, source, "again")
    assert again.uri.endswith("attempt-2/point-00000002")
    assert {"point-00000002", "step-00000001", "step-00000002"} <= files()
    assert not list(store.list(f"{point.uri}/")) and list(store.list(f"{again.uri}/"))
    for step in (3, 4):
        resumed.save(model.model, model.optimizers, model.set(step))
    resumed.settle()
    assert {"point-00000002", "step-00000003", "step-00000004"} <= files()

    store.put(f"{again.uri}/shard-00000", b"damaged")
    assert attempt().load_point(model.model, source) is None


@pytest.mark.parametrize("staging", ["Memory", "Disk"])
def test_training_continues_while_a_checkpoint_is_uploaded(
    world: World, run_spec_for: Any, tmp_path: Path, staging: str
) -> None:
    """The checkpoint holds the state at the call of ``save``."""
    model, run_spec = Model(), run_spec_for(run="1-async", checkpoint={"staging": staging})
    checkpointer = CheckpointManager.take(world, Stores(run_spec).default, run_spec, tmp_path)
    gate, put = threading.Event(), checkpointer.store.put

    def slow(uri: str, *arguments: Any, **options: Any) -> Any:
        assert gate.wait(30)
        return put(uri, *arguments, **options)

    checkpointer.store.put = slow  # type: ignore[method-assign]
    checkpointer.save(model.model, model.optimizers, model.set(1))
    model.set(2)
    assert not checkpointer.settled()
    assert checkpointer.latest_uri is None
    assert checkpointer.longest_save == 0, "none is known yet"
    gate.set()
    checkpointer.settle()
    assert 0 < checkpointer.longest_save < 60
    assert str(checkpointer.latest_uri).endswith("attempt-1/step-00000001")
    state = checkpointer.restore(model.model, model.optimizers)
    assert state is not None
    assert (state.step, model.values) == (1, {1.0})


def test_disk_staging_reserves_space_and_leaves_no_file(
    world: World, run_spec_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, run_spec = Model(), run_spec_for(run="1-disk", checkpoint={"staging": "Disk"})
    sizes: list[int] = []

    def reserve(descriptor: int, start: int, size: int) -> None:
        assert Path(f"/proc/self/fd/{descriptor}").readlink().parent == tmp_path
        if sizes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.truncate(descriptor, size)
        sizes.append(size)

    monkeypatch.setattr(os, "posix_fallocate", reserve)
    checkpointer = CheckpointManager.take(world, Stores(run_spec).default, run_spec, tmp_path)
    for step in (1, 2):  # the second step reuses the space
        checkpointer.save(model.model, model.optimizers, model.set(step))
    checkpointer.settle()
    trained = sum(p.numel() for p in model.model.parameters())
    assert sizes[0] == pytest.approx(12 * trained, rel=0.05)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    state = checkpointer.restore(model.model, model.optimizers)
    assert state is not None
    assert (state.step, model.values) == (2, {2.0})

    full = CheckpointManager.take(world, Stores(run_spec).default, run_spec, tmp_path)
    with pytest.raises(UserError, match=r"checkpoint\.staging: Memory") as caught:
        full.save(model.model, model.optimizers, model.set(3))
    assert caught.value.reason == "ScratchFull"


def test_a_restart_in_place_reads_nothing_from_storage(
    world: World,
    run_spec_for: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    roomy_disk: None,
) -> None:
    """Only HEAD is read, unless the node's copy is damaged, or lost with the pod."""
    model, run_spec = Model(), run_spec_for(run="1-near")
    store, read = Stores(run_spec).default, []
    for name in ("get", "get_range"):
        method = getattr(ObjectStore, name)

        def counted(self: ObjectStore, uri: str, *part: int, method: Any = method) -> bytes:
            data: bytes = method(self, uri, *part)
            read.append(uri.rsplit("/", 1)[1])
            return data

        monkeypatch.setattr(ObjectStore, name, counted)
    first = CheckpointManager.take(world, store, run_spec, tmp_path)
    for step in (1, 2):
        first.save(model.model, model.optimizers, model.set(step))
    first.settle()
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1, "of the newest alone"

    def restored(folder: Path) -> set[str]:
        again = CheckpointManager.take(world, store, run_spec, folder)
        model.set(99)
        read.clear()
        state = again.restore(model.model, model.optimizers)
        assert state is not None and (state.step, model.values) == (2, {2.0})
        return set(read)

    assert restored(tmp_path) == set()
    (shard,) = (tmp_path / "checkpoints").glob("*/shard-00000")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert restored(tmp_path) == {"shard-00000"}
    assert restored(tmp_path / "new") == {"shard-00000", ".metadata", "state.json"}


def spoil(checkpointer: CheckpointManager, number: int, name: str) -> None:
    """Flip a bit in the middle of a file of a checkpoint; ``number`` 0 is the newest. The copies on
    the node are lost, too."""
    shutil.rmtree(checkpointer.copies.folder, ignore_errors=True)
    uri = f"{checkpointer.head.checkpoints[number].uri}/{name}"
    data = bytearray(checkpointer.store.get(uri))
    data[len(data) // 2] ^= 1
    checkpointer.store.put(uri, bytes(data))


@pytest.mark.parametrize("name", ["shard-00000", ".metadata", "state.json"])
def test_damaged_checkpoint_is_discarded_and_the_previous_one_read(
    world: World, run_spec_for: Any, tmp_path: Path, name: str
) -> None:
    model, run_spec = Model(), run_spec_for(run="1-damage")
    checkpointer = CheckpointManager.take(world, Stores(run_spec).default, run_spec, tmp_path)
    for step in (1, 2):
        checkpointer.save(model.model, model.optimizers, model.set(step))
    checkpointer.settle()
    spoil(checkpointer, 0, name)
    model.set(99)
    state = checkpointer.restore(model.model, model.optimizers)
    assert state is not None
    assert (state.step, model.values) == (1, {1.0})
    assert [checkpoint.step for checkpoint in checkpointer.head.checkpoints] == [1]

    spoil(checkpointer, 0, name)
    with pytest.raises(StorageUnavailable) as caught:
        checkpointer.restore(model.model, model.optimizers)
    assert caught.value.reason == "CheckpointsDamaged"
    again = CheckpointManager.take(world, Stores(run_spec).default, run_spec, tmp_path)
    assert again.restore(model.model, model.optimizers) is None, "the next attempt starts at step 0"


def test_damaged_best_checkpoint_leaves_no_partly_loaded_model(
    world: World, run_spec_for: Any, tmp_path: Path
) -> None:
    """The newest checkpoint has the model's step, but the failed load has changed the model, so it
    must be loaded again."""
    model, run_spec = Model(), run_spec_for(run="1-halfway")
    checkpointer = CheckpointManager.take(world, Stores(run_spec).default, run_spec, tmp_path)
    for step, loss in ((1, 0.5), (2, 0.9)):
        state = model.set(step)
        state.validation = [ValidationPoint(step=step, sets={}, overall={"Loss": loss})]
        checkpointer.save(model.model, model.optimizers, state)
    checkpointer.settle()
    assert checkpointer.load_best(model.model, 2).step == 1
    assert model.values == {1.0}
    model.set(2)
    spoil(checkpointer, 1, "shard-00000")
    load = checkpointer._reader

    def halfway(checkpoint: Any) -> Any:
        model.set(77)
        return load(checkpoint)

    checkpointer._reader = halfway  # type: ignore[method-assign]
    assert checkpointer.load_best(model.model, 2).step == 2
    assert model.values == {2.0}


def test_all_ranks_learn_of_any_file_that_could_not_be_written(
    world: World, run_spec_for: Any, tmp_path: Path
) -> None:
    """This includes files that only rank 0 writes: the other ranks wait for its control message."""

    class Telling(World):
        told: ClassVar[list[Exception]] = []

        def on_all(self, work: Callable[[], T]) -> list[T]:
            try:
                return super().on_all(work)
            except Exception as error:
                self.told.append(error)
                raise

    model, run_spec = Model(), run_spec_for(run="1-told")
    checkpointer = CheckpointManager.take(world, Stores(run_spec).default, run_spec, tmp_path)
    checkpointer.channel = Telling(world.accelerator, world.control)
    put, failure = checkpointer.store.put, StorageUnavailable("StorageUnreachable", "gone")

    def failing(uri: str, *arguments: Any, **options: Any) -> Any:
        if uri.endswith("/state.json"):
            raise failure
        return put(uri, *arguments, **options)

    checkpointer.store.put = failing  # type: ignore[method-assign]
    checkpointer.save(model.model, model.optimizers, model.set(1))
    with pytest.raises(StorageUnavailable):
        checkpointer.settle()
    assert Telling.told == [failure]


def test_stale_attempt_is_fenced_at_settle(world: World, run_spec_for: Any, tmp_path: Path) -> None:
    model, run_spec = Model(), run_spec_for(run="1-fence")
    store = Stores(run_spec).default
    stale = CheckpointManager.take(world, store, run_spec, tmp_path / "stale")
    CheckpointManager.take(world, store, run_spec, tmp_path / "newer")
    stale.save(model.model, model.optimizers, model.set(1))
    with pytest.raises(Fenced):
        stale.settle()


def test_the_best_checkpoints_are_kept_besides_the_newest(
    world: World, run_spec_for: Any, tmp_path: Path
) -> None:
    model = Model()
    run_spec = run_spec_for(run="1-best", checkpoint={"keepLast": 1, "keepBest": 2})
    checkpointer = CheckpointManager.take(world, Stores(run_spec).default, run_spec, tmp_path)
    for step, loss in enumerate([3.0, 1.0, 2.0, 1.0, 5.0], start=1):
        state = model.set(step)
        state.validation = [ValidationPoint(step=step, sets={}, overall={"Loss": loss})]
        checkpointer.save(model.model, model.optimizers, state)
    checkpointer.settle()
    assert [c.step for c in checkpointer.head.checkpoints] == [5, 4, 2]
    assert str(checkpointer.best_uri).endswith("step-00000004"), "the newer of two equal metrics"
