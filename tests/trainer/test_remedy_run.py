"""``evaluation.remedy`` on real runs that forget: without it they are held by their gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from intent_runs import Runs, conversations

from finetune_api.remedy import RemedyResult
from finetune_trainer.failures import UserError
from finetune_trainer.prepared.dataset import PreparedData
from finetune_trainer.prepared.halves import retention_halves
from finetune_trainer.publish.published_results import read_all_predictions, read_results
from finetune_trainer.storage import runfiles

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

REMEDY = {"scan": "Interpolation", "points": ["0.75", "0.5", "0.25", "0.1"]}


@pytest.fixture
def runs(run_spec_for: Any, bucket: str, tiny_base: Path, tmp_path: Path) -> Runs:
    return Runs(run_spec_for, bucket, tiny_base, tmp_path)


def test_a_run_that_forgets_passes_its_gate_by_the_remedy(runs: Runs) -> None:
    plain = runs.prepared("1-plain", {})
    runs.train(plain)
    held = runs.publish(plain).held
    assert held is not None and "reply Loss WorsensAtMost: against Base" in held

    run_spec = runs.prepared("2-remdy", {"remedy": REMEDY})
    result = runs.train(run_spec)
    found = result.remedy
    assert found is not None and found.chosen == 0.25 and found.limits == {"reply": 1.0}
    changes = [point.retention[0].change or 0 for point in found.points]
    assert changes == sorted(changes, reverse=True) and changes[-1] == 0
    assert [point.qualifies for point in found.points] == [False, False, False, True, True, True]
    head = runs.head(run_spec)
    assert head.point is not None and head.point.source == head.best
    assert result.summary.checkpoint == head.point.uri

    # The gate passes on the half that has not chosen, which is all that is reported.
    summary = runs.publish(run_spec)
    assert summary.held is None and summary.remedy is not None
    assert summary.remedy.startswith("Interpolation: point 0.25, with the lowest validation loss")
    data = PreparedData.open(
        runs.store, runfiles.read_prepared(runs.store, run_spec.run_uri).uri, runs.folder / "read"
    )
    halves = retention_halves(data, run_spec.spec)
    assert halves is not None
    ((choosing, reported),) = zip(halves.choosing.values(), halves.reported.values(), strict=True)
    assert len(choosing) + len(reported) == 80
    published = read_results(runs.store, run_spec.output_uri)
    lines = [p for p in read_all_predictions(runs.store, published) if p.data_set == "reply"]
    prompts = {r.prompt for r in data.references("retention", reported.tolist())}
    assert len(lines) == len(reported)
    assert {line.prompt for line in lines if line.prompt} <= prompts
    (scores,) = (each for each in published.scores if each.name == "reply")
    assert scores.samples == len(reported)
    worsened = scores.tuned["Loss"] - scores.base["Loss"]
    assert worsened == pytest.approx(found.points[3].retention[0].change, abs=0.2)

    # What is published is the model at the point, and was loaded again from storage.
    tuned, chosen = runs.adapter(plain), runs.adapter(run_spec)
    for name, value in tuned.items():
        expected = 0.25 * value if ".lora_B." in name else value
        torch.testing.assert_close(chosen[name], expected, rtol=1e-5, atol=1e-7)
    assert published.evaluation.artefact is not None
    assert published.evaluation.artefact.formats == ["adapter", "merged"]
    assert published.evaluation.remedy == found
    page = runs.store.get(f"{run_spec.output_uri}/report.html").decode()
    assert "Remedy: between the base and the tuned model" in page
    card = runs.store.get(f"{run_spec.output_uri}/README.md").decode()
    assert "Remedy: Interpolation: point 0.25" in card
    assert "point 0.25 from the base model (Interpolation)" in card


def close(found: RemedyResult | None, expected: RemedyResult | None) -> None:
    assert found is not None and expected is not None
    assert found.chosen == expected.chosen
    for ours, theirs in zip(found.points, expected.points, strict=True):
        assert ours.validation_loss == pytest.approx(theirs.validation_loss, rel=1e-3)
        assert ours.qualifies == theirs.qualifies


def test_a_sharded_run_that_is_lost_chooses_as_one_process_does(runs: Runs) -> None:
    """Lost during the scan, it scans again; lost later, it has chosen."""
    spec: dict[str, Any] = {
        "method": {"type": "Full"}, "output": {"destination": runs.destination},
        "training": {"maxSteps": 12, "batchSize": 8, "learningRate": "1e-3", "precision": "FP32"},
    }  # fmt: skip
    remedy = {"remedy": REMEDY | {"scan": "LayerLinear"}}
    alone = runs.train(runs.prepared("1-alone", remedy, **spec))
    assert alone.remedy is not None and alone.remedy.chosen == 0.5
    run_spec = runs.prepared("2-shard", remedy, **spec, compute={"sharding": "FullShard"})
    sharded = runs.train(run_spec, 2, lost_at="point 0.5:")
    assert sharded.summary.restarts == 1
    close(sharded.remedy, alone.remedy)

    runs.store.delete([f"{run_spec.run_uri}/result.json"])
    again = runs.train(run_spec)
    assert again.remedy == sharded.remedy
    assert again.summary.checkpoint == sharded.summary.checkpoint
    assert "point 0.5:" not in (runs.folder / "2-shard-1-0" / "log").read_text()
    for ours, theirs in zip(again.summary.scores, sharded.summary.scores, strict=True):
        assert ours.tuned["Loss"] == pytest.approx(theirs.tuned["Loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("count", "validation", "because"),
    [
        (30, "0.1", "reply has .* and fewer than 20 decide nothing; give it about 60"),
        (80, "0.0001", "no validation sample is there"),
    ],
)
def test_a_remedy_that_could_choose_nothing_is_refused(
    runs: Runs, count: int, validation: str, because: str
) -> None:
    runs.store.put(runs.reply, conversations(count).encode())
    with pytest.raises(UserError, match=because) as caught:
        runs.prepared("1-fewer", {"remedy": REMEDY}, validation)
    assert caught.value.reason == "RemedyNotMeasured"
