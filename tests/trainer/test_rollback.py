"""Rollback to an earlier checkpoint: the samples that are left out, and that the rollback survives
the death of an attempt."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from bench import Attempt, Bench, curve
from engine import CPU, samples, session_of, spec_of, tiny_llama
from test_checkpoint import Died, Model, Mortal
from torch import Tensor

from finetune_api.run_spec import RunSpec
from finetune_trainer.engine.guard import Guard
from finetune_trainer.engine.packing.feed import Feed
from finetune_trainer.engine.planning.plan import Packing, Plan
from finetune_trainer.engine.world import join
from finetune_trainer.failures import Diverged
from finetune_trainer.prepared import origins
from finetune_trainer.prepared.dataset import PreparedData
from finetune_trainer.prepared.origins import origins_of
from finetune_trainer.storage import runfiles
from finetune_trainer.storage.objects import Stores
from finetune_trainer.storage.run_head import Head, Rollback
from finetune_trainer.train.checkpoint import CheckpointManager
from finetune_trainer.train.step import optimizer_step
from variants import beyond

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


def poisoned(bench: Bench) -> dict[str, Any]:
    """Two data sets. The second is one record unlike all others, drawn only after training on the
    first."""
    poison = json.dumps({"text": "the the the the ", "label": "~}|{`^]\\[@?>=<;:"}) + "\n"
    bench.store.put(f"{bench.bucket}/poison.jsonl", poison.encode())
    return {
        "train": [
            {"name": "good", "source": f"{bench.bucket}/train.jsonl"},
            {"name": "bad", "source": f"{bench.bucket}/poison.jsonl"},
        ],
        "test": [{"source": f"{bench.bucket}/train.jsonl"}],
        "split": {"validation": "0"},
        "stages": [
            {"name": "calm", "steps": "3", "weights": [{"name": "good", "weight": "1"}]},
            {"name": "mixed", "steps": "1"},
        ],
        "quality": {"deduplicate": False},
    }


def test_a_loss_spike_causes_a_rollback_that_leaves_its_samples_out(bench: Bench) -> None:
    run_spec = bench.run_spec(
        "1-spike", data=poisoned(bench), method={"type": "Full"},
        training={"epochs": 12, "learningRate": "1e-2",
                  "guard": {"maxSkippedSteps": 0, "spikeDeviations": "6"}},
    )  # fmt: skip
    result = bench.finish(run_spec, 2, "spike")
    assert (result.summary.skipped_steps, result.summary.rollbacks) == (1, 1)
    assert result.summary.steps == bench.total_steps(run_spec)
    assert all("bad" not in point.by_source for point in result.curve)
    assert result.summary.quarantined_samples == 8, "the batch with the spike"
    named = [(place.data_set, place.number) for place in result.quarantined]
    assert len(named) == 8 and ("bad", 1) in named
    rates = {point.step: point.learning_rate for point in result.curve}
    assert rates[result.summary.steps] < rates[result.summary.steps - 30] / 2


def test_too_many_loss_spikes_fail_the_run(bench: Bench, tmp_path: Path) -> None:
    run_spec = bench.run_spec(
        "1-spikes", data=poisoned(bench), method={"type": "Full"},
        training={"epochs": 12, "learningRate": "1e-2",
                  "guard": {"maxSkippedSteps": 0, "maxRollbacks": 0, "spikeDeviations": "6"}},
    )  # fmt: skip
    with pytest.raises(Diverged, match="sample 1 of 'bad'") as caught:
        FaultyAttempt(run_spec, tmp_path).train()
    assert caught.value.reason == "LossSpike"
    assert "training.guard.maxRollbacks: 0" in caught.value.message


class Faulty(Guard):
    """A guard that sees NaN as the loss of some steps, if they have samples."""

    bad: frozenset[int] = frozenset()

    def judge(self, step: int, loss: Tensor, norm: Tensor, *, learns: bool = True) -> Tensor:
        loss = loss * math.nan if learns and step in self.bad else loss
        return super().judge(step, loss, norm, learns=learns)


class MortalOnceBack(Mortal):
    """A store that counts writes from the write of the rollback on."""

    def __init__(self, store: Any, life: int, made: bool) -> None:
        super().__init__(store, 10**9, made)
        self._left, self._back = life, False

    def __getattr__(self, name: str) -> Any:
        method = super().__getattr__(name)

        def put(uri: str, data: bytes, **condition: Any) -> Any:
            if not self._back and uri.endswith("/HEAD.json"):
                self._back = bool(Head.model_validate_json(data).rollbacks)
                self.life = self._left if self._back else self.life
            return method(uri, data, **condition)

        return put if name == "put" else method


class FaultyAttempt(Attempt):
    """An attempt with NaN losses at some steps, and whose process may die."""

    def __init__(self, run_spec: RunSpec, folder: Path, bad: frozenset[int] = frozenset()) -> None:
        super().__init__(run_spec, folder)
        guard = Faulty(run_spec.spec.training.guard, self.session.world.device)
        guard.bad = bad
        self.session.guard = guard

    def mortal(self, life: int, made: bool) -> None:
        """Die at a write, counted from the rollback's, which is 0; ``made``: after the write
        instead of before."""
        mortal: Any = MortalOnceBack(self.checkpointer.store, life, made)
        self.checkpointer.store = self.checkpointer._held._store = mortal


def short(bench: Bench, run: str, **guard: int) -> RunSpec:
    """A run of 20 steps with a checkpoint every 3 steps."""
    return bench.run_spec(
        run, training={"maxSteps": 20, "epochs": None, "guard": {"maxSkippedSteps": 0} | guard},
        evaluation={"everySteps": 10, "maxSamples": 1},
    )  # fmt: skip


BAD = frozenset({7})
DEATHS = [(0, False), (0, True), (1, False), (4, True)]
"""(life, made): at the write of the rollback, and at the first and the last write of the next
checkpoint."""


@pytest.mark.parametrize(
    ("life", "made"), beyond(DEATHS, lambda life, made: (life, made) in ((0, True), (4, True)))
)
def test_a_rollback_survives_the_death_of_an_attempt(
    bench: Bench, tmp_path: Path, life: int, made: bool
) -> None:
    """The result is that of a run without a death."""
    run_spec = short(bench, "1-whole")
    attempt = FaultyAttempt(run_spec, tmp_path / "whole", BAD)
    whole = attempt.train()
    assert (whole.steps, whole.skipped_steps, whole.rollbacks) == (20, 1, 1)
    left_out = attempt.session.plan.drawn(BAD).tolist()
    assert attempt.session.plan.left_out.tolist() == left_out and len(left_out) == 8
    expected = runfiles.read_result(bench.store, run_spec.run_uri)
    assert 8 not in curve(expected), "a step without samples is in no mean of the curve"

    run_spec = short(bench, "1-died")
    lost = FaultyAttempt(run_spec, tmp_path / "died", BAD)
    lost.mortal(life, made)
    with pytest.raises(Died):
        lost.train()
    head = bench.head(run_spec)
    assert head is not None
    noted = life > 0 or made
    assert head.left_out == ([7] if noted else [])
    assert (max(checkpoint.step for checkpoint in head.checkpoints) <= 7) is (life < 4)

    # If HEAD names the rollback, the resumed run has no NaN loss.
    resumed = FaultyAttempt(run_spec, tmp_path / "again", BAD if not noted else frozenset())
    found = resumed.train()
    assert resumed.session.plan.left_out.tolist() == left_out
    assert (found.attempt, found.skipped_steps, found.rollbacks) == (2, 1, 1)
    assert found.tokens == whole.tokens
    result = runfiles.read_result(bench.store, run_spec.run_uri)
    assert result.quarantined == expected.quarantined
    assert curve(result) == pytest.approx(curve(expected), rel=1e-5)


def test_rollbacks_of_all_attempts_are_counted(bench: Bench, tmp_path: Path) -> None:
    run_spec = short(bench, "1-counted", maxRollbacks=1)
    lost = FaultyAttempt(run_spec, tmp_path / "lost", BAD)
    lost.mortal(0, made=True)
    with pytest.raises(Died):
        lost.train()
    with pytest.raises(Diverged, match="rollbacks before: 1") as caught:
        FaultyAttempt(run_spec, tmp_path / "again", frozenset({8})).train()
    assert caught.value.reason == "LossNotFinite"
    assert bench.head(run_spec).left_out == [7]  # type: ignore[union-attr]


def test_a_run_that_would_leave_all_samples_out_has_diverged(bench: Bench, tmp_path: Path) -> None:
    """Otherwise it would succeed without having trained."""
    run_spec = short(bench, "1-nothing", maxRollbacks=100)
    with pytest.raises(Diverged, match="without their samples none would be left"):
        FaultyAttempt(run_spec, tmp_path / "nothing", frozenset(range(3, 20))).train()
    left = bench.head(run_spec).left_out  # type: ignore[union-attr]
    assert left[:5] == [3, 4, 5, 6, 7] and left == sorted({*left})


@pytest.mark.parametrize("made", [False, True], ids=["before", "after"])
def test_a_rollback_is_written_completely_or_not_at_all(
    run_spec_for: Any, tmp_path: Path, made: bool
) -> None:
    model, run_spec = (
        Model(),
        run_spec_for(run="1-rewind", training={"precision": "FP32"}, checkpoint={"keepLast": 3}),
    )
    world, store = join(run_spec.spec), Stores(run_spec).default
    checkpointer = CheckpointManager.take(world, store, run_spec, tmp_path)
    for step in (3, 6, 9):
        checkpointer.save(model.model, model.optimizers, model.set(step))
    checkpointer.settle()
    mortal: Any = Mortal(store, 0, made)
    checkpointer._held._store = mortal
    back = Rollback(attempt=1, skipped=[7, 8], skipped_steps=2)
    with pytest.raises(Died):
        checkpointer.rewind(model.model, model.optimizers, back)

    after = CheckpointManager.take(world, store, run_spec, tmp_path)
    assert after.head.rollbacks == ([back] if made else [])
    assert [c.step for c in after.head.checkpoints] == ([6, 3] if made else [9, 6, 3])
    state = after.restore(model.model, model.optimizers)
    assert state is not None
    assert model.values == {float(state.step)} == {6.0 if made else 9.0}
    early = Rollback(attempt=2, skipped=[2], skipped_steps=3)
    assert after.rewind(model.model, model.optimizers, early) is None
    assert after.head.rollbacks == ([back] if made else []), "no checkpoint is old enough"


def test_sample_origins_name_data_set_number_and_row(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If no sample is held out or dropped, the number is the line number."""
    sources = {"quiet": f"{bench.bucket}/train.jsonl", "loud": f"{bench.bucket}/more.jsonl"}
    train_sets = [{"name": name, "source": uri} for name, uri in sources.items()]
    run_spec = bench.run_spec("1-named", data={
        "train": train_sets, "split": {"validation": "0", "test": "0"},
        "quality": {"deduplicate": False}})  # fmt: skip
    uri = runfiles.read_prepared(bench.store, run_spec.run_uri).uri
    data = PreparedData.open(bench.store, uri, tmp_path / "data")
    lines = {name: bench.store.get(at).decode().splitlines() for name, at in sources.items()}
    positions = [0, 17, 95, 96, 135]
    found = origins_of(data, "train", positions)
    assert [(p.data_set, p.number) for p in found] == [
        ("quiet", 1), ("quiet", 18), ("quiet", 96), ("loud", 1), ("loud", 40)]  # fmt: skip
    for place, position in zip(found, positions, strict=True):
        (sample,) = data.samples("train", [position])
        record = json.loads(lines[place.data_set][place.number - 1])
        said = "".join(map(chr, sample.ids[sample.ids < 128]))
        assert said.startswith(record["text"]) and said.endswith(record["label"]), place
        path = tmp_path / "shard"
        bench.store.download(f"{uri}/{place.shard}", path)
        batch = pa.ipc.open_file(str(path)).get_batch(0)
        assert batch.column("input_ids")[place.row].as_py() == sample.ids.tolist()
    monkeypatch.setattr(origins, "MOST", 3)
    assert origins_of(data, "train", positions) == found[:3]


@pytest.mark.parametrize("packing", ["Concatenated", "Unpacked"])
def test_a_step_without_samples_is_in_no_mean(packing: Packing) -> None:
    spec = spec_of({"type": "Full"}, guard={"spikeDeviations": "6"})
    documents = samples([20, 30, 25, 15])
    lengths = torch.tensor([len(d.ids) for d in documents]).numpy()
    plan = Plan(
        lengths, lengths // 2, batch_size=2, seed=0, micro_batch_tokens=64, ranks=1, packing=packing
    )
    plan.leave_out([1])
    session = session_of(tiny_llama(), spec, plan)
    guard, seen = session.guard, []
    with Feed(plan, lambda ps: [documents[p] for p in ps], rank=0, start=0, end=2,
              device=CPU) as feed:  # fmt: skip
        for batch in feed:
            sums, norm, _ = optimizer_step(session, batch, 1e-2)
            seen.append((guard.statistics, sums, float(norm)))
    (statistics, sums, norm), (kept, nothing, none) = seen
    assert statistics[0] == 1 and kept == statistics
    assert sums[1] == 1 and norm > 0
    assert nothing.shape == sums.shape and not nothing.any() and none == 0
    assert guard.skipped() == [], "not counted as a skipped step"
