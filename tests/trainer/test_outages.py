"""Checkpoints that fail because of storage: when training continues, and when the attempt ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from bench import Attempt, Bench, curve
from outages import AWAY, lose_answer, refuse_writes
from test_checkpoint import PART, WIDE, Model
from test_rollback import BAD, FaultyAttempt

from finetune_api.run_spec import RunSpec
from finetune_trainer.engine.world import join
from finetune_trainer.failures import (
    Fenced,
    Interrupted,
    StorageDenied,
    StorageUnavailable,
    TrainerError,
)
from finetune_trainer.storage import checkpoint_files, runfiles
from finetune_trainer.storage.checkpoint_files import read_file
from finetune_trainer.storage.objects import ObjectStore, Stores
from finetune_trainer.train.checkpoint import CheckpointManager

pytestmark = [pytest.mark.usefixtures("one_thread", "mended"), pytest.mark.slow]


@pytest.fixture
def mended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore the object store methods after the test."""
    for name in ("put", "get_tagged"):
        monkeypatch.setattr(ObjectStore, name, getattr(ObjectStore, name))


def short(bench: Bench, run: str, steps: int = 20, every: int = 3, **spec: Any) -> RunSpec:
    """A run with a checkpoint every ``every`` steps and at the end."""
    return bench.run_spec(
        run, training={"maxSteps": steps, "epochs": None, "guard": {"maxSkippedSteps": 0}},
        checkpoint={"everySteps": every, "keepLast": 20},
        evaluation={"everySteps": 1000, "maxSamples": 1}, **spec,
    )  # fmt: skip


def of(*steps: int) -> list[str]:
    """Marks of the files of the checkpoints at these steps."""
    return [f"step-{step:08}/" for step in steps]


def metric(attempt: Attempt, name: str) -> float:
    value = attempt.telemetry.registry.get_sample_value(name)
    assert value is not None, name
    return value


def kept(bench: Bench, run_spec: RunSpec) -> list[int]:
    """Return the steps of the checkpoints in HEAD. Check that they are complete, and that storage
    holds no other files of checkpoints."""
    head = bench.head(run_spec)
    assert head is not None
    named = {f"{c.uri}/{name}" for c in head.checkpoints for name in c.files}
    assert {o.uri for o in bench.store.list(f"{run_spec.run_uri}/attempt-")} == named
    for checkpoint in head.checkpoints:
        assert read_file(bench.store, checkpoint, "state.json")
        assert read_file(bench.store, checkpoint, ".metadata")
    return [checkpoint.step for checkpoint in head.checkpoints]


def test_training_continues_through_abandoned_checkpoints(bench: Bench) -> None:
    """Failed writes: a shard of rank 1, a file of rank 0, and HEAD; not three in a row."""
    undisturbed = short(bench, "1-whole")
    Attempt(undisturbed, bench.tmp_path / "whole").train()
    whole = runfiles.read_result(bench.store, undisturbed.run_uri)

    run_spec = short(bench, "1-outage")
    marks = ("step-00000003/shard-00001", "step-00000009/state.json", 'step-00000015"')
    world = bench.start(run_spec, 2, "outage", partial(refuse_writes, *marks, times=100))
    assert world.wait() == [0, 0], world.log.read_text()
    found, log = runfiles.read_result(bench.store, run_spec.run_uri), world.log.read_text()
    for step, newest, reason in (
        (3, "none yet", "StorageUnreachable"), (9, "of step 6", "StorageUnreachable"),
        (15, "of step 12", "HeadContended"),
    ):  # fmt: skip
        said = f"the checkpoint of step {step} is abandoned, and the next one is tried"
        assert f"{said} (the newest is {newest}). {reason}: " in log
    assert log.count("is abandoned") == 3, "logged by one rank"
    assert kept(bench, run_spec) == [20, 18, 12, 6]
    assert curve(found) == pytest.approx(curve(whole), rel=1e-4)
    assert (found.summary.attempt, found.summary.checkpoint_step) == (1, 20)
    for ours, theirs in zip(found.summary.scores, whole.summary.scores, strict=True):
        assert ours.tuned == pytest.approx(theirs.tuned, rel=1e-4)


def test_consecutive_abandoned_checkpoints_end_the_attempt(bench: Bench) -> None:
    run_spec = short(bench, "1-row")
    attempt = Attempt(run_spec, bench.tmp_path / "row")
    refuse_writes(*of(6, 9, 12))
    with pytest.raises(StorageUnavailable, match="step-00000012/"):
        attempt.train()
    assert metric(attempt, "finetune_step") <= 15
    assert metric(attempt, "finetune_checkpoints_abandoned_total") == 2
    assert attempt.telemetry.progress.checkpoints_abandoned == 2
    assert [checkpoint.step for checkpoint in bench.head(run_spec).checkpoints] == [3]  # type: ignore[union-attr]


DENIED = StorageDenied("AccessDenied", "no")


@pytest.mark.parametrize("failure", [AWAY, DENIED, Fenced("Fenced", "")], ids=lambda f: f.reason)
def test_only_unavailable_storage_is_tolerated(bench: Bench, failure: TrainerError) -> None:
    """Other failures end the attempt as soon as they are seen, long before the next checkpoint."""
    run_spec = short(bench, "1-heard", every=10)
    attempt = Attempt(run_spec, bench.tmp_path / "heard")
    checkpointer, abandoned = attempt.checkpointer, {}
    if isinstance(failure, Fenced):
        CheckpointManager.take(
            attempt.session.world, bench.store, run_spec, bench.tmp_path / "newer"
        )
    else:
        refuse_writes(*of(10), failure=failure)

    def heard() -> bool:
        step = int(metric(attempt, "finetune_step"))
        abandoned[step] = checkpointer.abandoned
        deadline = time.monotonic() + 60
        while step == 12 and not checkpointer.failed and time.monotonic() < deadline:
            time.sleep(0.01)
        return False

    if failure is AWAY:
        attempt.train(heard)
        assert (abandoned[12], abandoned[13]) == (0, 1)
        assert kept(bench, run_spec) == [20]
        return
    with pytest.raises(type(failure)):
        attempt.train(heard)
    assert max(abandoned) == 12 and not any(abandoned.values())


@pytest.mark.parametrize("refused", [(9,), (3, 6, 9)], ids=str)
def test_a_stop_saves_after_abandoned_checkpoints(bench: Bench, refused: tuple[int, ...]) -> None:
    run_spec = short(bench, "1-stop")
    attempt = Attempt(run_spec, bench.tmp_path / "stop")
    refuse_writes(*of(*refused))
    with pytest.raises(Interrupted, match="step 11 of 20 is saved"):
        attempt.train(lambda: metric(attempt, "finetune_step") >= 11)
    assert kept(bench, run_spec) == [11, *(step for step in (9, 6, 3) if step not in refused)]
    assert bench.head(run_spec).released  # type: ignore[union-attr]
    assert attempt.telemetry.progress.checkpoints_abandoned == len(refused)


@pytest.mark.parametrize("refused", [(9,), (3, 6, 9)], ids=str)
def test_the_last_step_is_saved_after_abandoned_checkpoints(
    bench: Bench, refused: tuple[int, ...]
) -> None:
    run_spec = short(bench, "1-last", steps=10)
    attempt = Attempt(run_spec, bench.tmp_path / "last")
    refuse_writes(*of(*refused))
    assert attempt.train().checkpoint_step == 10
    assert kept(bench, run_spec)[0] == 10
    assert attempt.telemetry.progress.checkpoints_abandoned == len(refused)


@pytest.mark.parametrize(("stop", "refused"), [(5, (3, 5)), (100, (9, 10))], ids=["stop", "last"])
def test_a_failed_mandatory_checkpoint_ends_the_attempt(
    bench: Bench, stop: int, refused: tuple[int, ...]
) -> None:
    run_spec = short(bench, "1-must", steps=10)
    attempt = Attempt(run_spec, bench.tmp_path / "must")
    refuse_writes(*of(*refused))
    with pytest.raises(StorageUnavailable, match=f"step-{refused[-1]:08}/"):
        attempt.train(lambda: metric(attempt, "finetune_step") >= stop)
    assert not bench.head(run_spec).released  # type: ignore[union-attr]


def test_a_commit_with_a_lost_response_is_found_by_the_next_checkpoint(bench: Bench) -> None:
    """This attempt moved HEAD: it is not fenced, and the checkpoint is committed."""
    run_spec = short(bench, "1-lost", steps=10)
    attempt = Attempt(run_spec, bench.tmp_path / "lost")
    lose_answer('step-00000006"')
    attempt.train()
    assert attempt.telemetry.progress.checkpoints_abandoned == 1
    assert kept(bench, run_spec) == [10, 9, 6, 3]


@pytest.mark.parametrize(
    ("fault", "back"),
    [
        (partial(refuse_writes, "step-00000006/state.json"), 3),
        (partial(lose_answer, 'step-00000006"'), 6),
    ],
    ids=["abandoned", "response lost"],
)
def test_a_rollback_restores_the_newest_committed_checkpoint(
    bench: Bench, fault: Callable[[], None], back: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The abandoned checkpoint's step is saved again, over its leftover files."""
    run_spec = short(bench, "1-back")
    attempt = FaultyAttempt(run_spec, bench.tmp_path / "back", BAD)
    fault()
    summary = attempt.train()
    assert f"back to step {back}, without" in capsys.readouterr().out
    assert (summary.steps, summary.rollbacks, summary.skipped_steps) == (20, 1, 1)
    assert kept(bench, run_spec) == [20, 18, 15, 12, 9, 6, 3]


def test_a_rollback_without_a_checkpoint_because_of_storage_is_retryable(bench: Bench) -> None:
    """StorageUnavailable, not Diverged."""
    run_spec = short(bench, "1-none")
    attempt = FaultyAttempt(run_spec, bench.tmp_path / "none", BAD)
    refuse_writes(*of(3, 6))
    with pytest.raises(StorageUnavailable, match="step-00000006/"):
        attempt.train()
    assert bench.head(run_spec).rollbacks == []  # type: ignore[union-attr]


def test_parts_of_an_abandoned_checkpoint_are_removed_with_the_next(
    run_spec_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage was also unavailable when the parts were to be dropped."""
    monkeypatch.setattr(checkpoint_files, "PART_BYTES", PART)
    run_spec = run_spec_for(run="1-parts", training={"precision": "FP32"})
    model, store = Model(**WIDE), Stores(run_spec).default
    checkpointer = CheckpointManager.take(join(run_spec.spec), store, run_spec, tmp_path)

    def away(*arguments: Any) -> Any:
        raise AWAY

    with monkeypatch.context() as outage:
        outage.setattr(store, "join_parts", away)
        outage.setattr(store, "drop_parts", away)
        checkpointer.save(model.model, model.optimizers, model.set(1))
        checkpointer.abandon_failed_upload()
    assert len(list(store.open_parts(run_spec.run_uri))) == 1
    checkpointer.save(model.model, model.optimizers, model.set(2))
    checkpointer.settle()
    assert [checkpoint.step for checkpoint in checkpointer.head.checkpoints] == [2]
    assert list(store.open_parts(run_spec.run_uri)) == []
