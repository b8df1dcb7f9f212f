"""``evaluation.dataCurve`` on real runs: the parts, what they change, and what survives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from curve_worker import train_on_all
from intent_runs import Runs

from finetune_api.evaluation_results import TUNED
from finetune_trainer.failures import UserError
from finetune_trainer.prepare.pipeline import prepare
from finetune_trainer.storage import runfiles
from variants import beyond

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

CURVE: dict[str, Any] = {"dataCurve": True, "gates": [], "maxSamples": 25}


@pytest.fixture
def runs(run_spec_for: Any, bucket: str, tiny_base: Path, tmp_path: Path) -> Runs:
    return Runs(run_spec_for, bucket, tiny_base, tmp_path)


def test_a_run_with_a_curve_is_the_run_without_one(runs: Runs) -> None:
    plain = runs.train(runs.prepared("1-plain", CURVE | {"dataCurve": False}))
    assert plain.data_curve == []
    run_spec = runs.prepared("2-curve", CURVE)
    result = runs.train(run_spec)
    assert result.curve == plain.curve
    assert result.validation == plain.validation
    assert result.summary.scores == plain.summary.scores
    samples = result.data_curve[-1].samples
    assert [(p.share, p.samples, p.steps) for p in result.data_curve] == [
        (0.25, -(-samples // 4), 8), (0.5, -(-samples // 2), 15), (1.0, samples, 30),
    ]  # fmt: skip
    losses = [p.validation_loss for p in result.data_curve]
    assert losses[0] and losses[1] and losses[2] and losses[0] > losses[2]
    assert all(p.process_seconds > 0 for p in result.data_curve[:-1])
    spent = result.summary.time
    assert spent is not None
    assert spent.seconds["evaluation"] > sum(p.process_seconds for p in result.data_curve)

    runs.publish(run_spec)
    found = json.loads(runs.store.get(f"{run_spec.output_uri}/metrics.json"))
    points, (of_set,) = found["dataCurve"]["points"], found["dataCurve"]["sets"]
    assert [point["validationLoss"] for point in points] == losses
    tuned = next(r for r in found["test"][0]["rows"] if r["row"] == "Tuned")
    assert of_set["metric"] == "Accuracy"
    assert of_set["values"][-1] == tuned["metrics"]["Accuracy"]
    assert "more of the same data" in of_set["because"]
    page = runs.store.get(f"{run_spec.output_uri}/report.html").decode()
    assert "Would more data help?" in page and of_set["because"] in page


@pytest.mark.parametrize(
    ("method", "size"),
    beyond([("LoRA", 1), ("Full", 1), ("Full", 2)], lambda *case: case != ("Full", 1)),
)
def test_a_training_on_all_samples_repeats_the_run(runs: Runs, method: str, size: int) -> None:
    """From the weights of the start, in the same order, at the same rates: every bit."""
    sharded = {"compute": {"sharding": "FullShard"}} if size > 1 else {}
    training = {"maxSteps": 12, "batchSize": 8, "learningRate": "1e-3", "precision": "FP32"}
    run_spec = runs.prepared(
        "1-again", CURVE, method={"type": method}, training=training, **sharded,
        output={"destination": runs.destination},
    )  # fmt: skip
    result = runs.train(run_spec, size, before=train_on_all)
    again, whole = result.data_curve
    assert again.steps == whole.steps and again.validation_loss == whole.validation_loss
    part = runfiles.read_part(runs.store, run_spec.run_uri, 1.0)
    tuned = runfiles.read_row(runs.store, run_spec.run_uri, TUNED)
    assert part.sets == [found for found in tuned.sets if found.name == "intent"]


def test_a_part_that_has_ended_is_not_trained_again(runs: Runs) -> None:
    training = {"maxSteps": 12, "batchSize": 8, "learningRate": "4e-3", "precision": "FP32"}
    alone = runs.train(runs.prepared("1-alone", CURVE, training=training))
    run_spec = runs.prepared("2-lost", CURVE, training=training)
    lost = runs.train(run_spec, 2, lost_at="data curve: 50 %")
    assert "data curve: 25 %" not in (runs.folder / "2-lost-2-1" / "log").read_text()
    assert lost.summary.restarts == 1
    for ours, theirs in zip(lost.data_curve, alone.data_curve, strict=True):
        assert (ours.samples, ours.steps) == (theirs.samples, theirs.steps)
        assert ours.validation_loss == pytest.approx(theirs.validation_loss, rel=1e-3)

    # Begun in vain too often, it is left out.
    store, run_uri = runs.store, run_spec.run_uri
    runfiles.write_part(store, run_uri, 0.25, runfiles.PartTraining(tries=2))
    store.delete([f"{run_uri}/result.json"])
    again = runs.train(run_spec)
    assert [point.share for point in again.data_curve] == [0.5, 1.0]
    assert again.data_curve[0] == lost.data_curve[1]
    runs.publish(run_spec)
    found = runfiles.read_evaluation(store, run_uri).data_curve
    assert found is not None and found.not_measured == [0.25]
    assert found.sets[0].values[0] is None and found.sets[0].comparison is not None


def test_a_curve_that_would_measure_nothing_is_refused(runs: Runs) -> None:
    train = [{"name": "intent", "source": f"s3://{runs.bucket}/intent-train.jsonl"}]
    run_spec = runs.run_spec_for(
        data={"train": train, "split": {"validation": "0.0", "test": "0.0"}},
        evaluation={"dataCurve": True, "baselines": {"shots": []}},
    )
    with pytest.raises(UserError, match="no test and no validation sample") as caught:
        prepare(run_spec, runs.stores, runs.folder / "prepare")
    assert caught.value.reason == "DataCurveNotMeasured"
