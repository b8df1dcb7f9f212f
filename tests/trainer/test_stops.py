"""Stopped attempts: what they save, and whether the next attempt counts as a restart."""

from __future__ import annotations

import pytest
from bench import Attempt, Bench
from worlds import worker_folder

from finetune_trainer.failures import Interrupted
from finetune_trainer.storage import runfiles

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("told", "restarts"), [((0, 1), 0), ((1,), 1)])
def test_a_stop_saves_and_is_a_restart_unless_it_reached_all_ranks(
    bench: Bench, told: tuple[int, ...], restarts: int
) -> None:
    run_spec = bench.run_spec(f"1-stop{len(told)}", checkpoint={"everySeconds": 3600},
                        training={"maxSteps": 60, "epochs": None},
                        evaluation={"everySteps": 100000})  # fmt: skip
    world = bench.start(run_spec, 2, "stopped")
    world.wait_for_log("step")
    world.send_stop(*told)
    assert world.wait() == [23, 23], world.log.read_text()
    head = bench.head(run_spec)
    assert head is not None
    assert head.released is (restarts == 0)
    assert len(head.checkpoints) == 1
    result = bench.finish(run_spec, 1, "again")
    assert (result.summary.attempt, result.summary.restarts) == (2, restarts)
    assert result.summary.steps == 60


def test_a_stop_during_startup_ends_the_attempt(bench: Bench) -> None:
    run_spec = bench.run_spec("1-early")
    folder = bench.tmp_path / "early"
    for rank in (0, 1):
        worker_folder(folder, rank).mkdir(parents=True)
        (worker_folder(folder, rank) / "stop").touch()
    world = bench.start(run_spec, 2, "early")
    assert world.wait() == [23, 23], world.log.read_text()
    told = (worker_folder(folder, 0) / "failure-0.json").read_text()
    assert "before the model was fetched" in told
    head = bench.head(run_spec)
    assert head is not None and head.released and not head.checkpoints


@pytest.mark.parametrize("every", [4, 12])  # during training, and at the last step
def test_a_stop_during_validation_saves_and_the_next_attempt_validates(
    bench: Bench, every: int
) -> None:
    steps = {"training": {"maxSteps": 12, "epochs": None}, "evaluation": {"everySteps": every}}
    whole, cut = bench.run_spec("1-whole", **steps), bench.run_spec("1-cut", **steps)
    Attempt(whole, bench.tmp_path / "a").train()
    stopped = Attempt(cut, bench.tmp_path / "b")
    told: set[str] = set()

    def evaluating() -> bool:
        told.add(stopped.telemetry.progress.stage)
        return "Evaluating" in told

    with pytest.raises(Interrupted, match="before set"):
        stopped.train(evaluating)
    head = bench.head(cut)
    assert head is not None and head.released
    assert head.checkpoints[0].step == every and head.checkpoints[0].metric is None
    Attempt(cut, bench.tmp_path / "c").train()
    results = [runfiles.read_result(bench.store, run_spec.run_uri) for run_spec in (whole, cut)]
    assert results[0].validation == results[1].validation
    assert results[0].curve == results[1].curve
    assert results[0].summary.checkpoint_step == results[1].summary.checkpoint_step
    assert results[1].summary.restarts == 0
