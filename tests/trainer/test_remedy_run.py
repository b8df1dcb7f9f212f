"""``evaluation.remedy`` on real runs that forget: without it they are held by their gate."""

from __future__ import annotations

import json
import os
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from worlds import start_world

from finetune_api.remedy import RemedyResult
from finetune_api.results import PublishSummary
from finetune_api.run_spec import RunSpec
from finetune_trainer.failures import UserError
from finetune_trainer.prepare.pipeline import prepare
from finetune_trainer.prepared.dataset import PreparedData
from finetune_trainer.prepared.halves import retention_halves
from finetune_trainer.publish.pipeline import publish
from finetune_trainer.publish.published_results import read_all_predictions, read_results
from finetune_trainer.quickstart.language import draw_ticket, message, reply
from finetune_trainer.storage import runfiles
from finetune_trainer.storage.objects import Stores
from finetune_trainer.storage.run_head import Head, read_head

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

GATE = {"dataSet": "reply", "metric": "Loss", "operator": "WorsensAtMost", "value": "1"}
REMEDY = {"scan": "Interpolation", "points": ["0.75", "0.5", "0.25", "0.1"]}


def conversations(count: int) -> str:
    """What the base model can do: answer customers."""
    random, lines = Random(7), []
    for _ in range(count):
        ticket = draw_ticket(random)
        turns = (("user", message(ticket, random)), ("assistant", reply(ticket, random)))
        messages = [{"role": role, "content": content} for role, content in turns]
        lines.append(json.dumps({"messages": messages}))
    return "\n".join(lines)


class Runs:
    """Runs that learn to classify messages at a high rate, and forget to answer customers."""

    def __init__(self, run_spec_for: Any, bucket: str, base: Path, folder: Path) -> None:
        self._run_spec_for, self._bucket, self.folder = run_spec_for, bucket, folder
        self.reply = f"s3://{bucket}/reply.jsonl"
        self.stores = Stores(run_spec_for())
        self.store = self.stores.default
        for path in (base / "model").iterdir():
            self.store.upload(path, f"s3://{bucket}/model/{path.name}")
        for name in ("intent-train", "intent-test"):
            self.store.upload(base / "data" / f"{name}.jsonl", f"s3://{bucket}/{name}.jsonl")
        self.store.put(self.reply, conversations(80).encode())

    def prepared(
        self, run: str, evaluation: dict[str, Any], validation: str = "0.1", **spec: Any
    ) -> RunSpec:
        def source(name: str, of: str) -> dict[str, str]:
            return {"name": name, "source": f"s3://{self._bucket}/{of}.jsonl"}

        run_spec: RunSpec = self._run_spec_for(
            run=run,
            data={
                "train": [source("intent", "intent-train")],
                "test": [source("intent", "intent-test")],
                "retention": [source("reply", "reply")],
                "split": {"validation": validation}, "quality": {"contamination": "Ignore"},
            },
            evaluation={
                "maxNewTokens": 4, "maxSamples": 8, "baselines": {"shots": []}, "gates": [GATE],
                **evaluation,
            },
            **{
                "training": {
                    "maxSteps": 30, "batchSize": 8, "learningRate": "4e-3", "precision": "FP32",
                },
                "output": {"destination": self.destination, "format": "Both"},
            } | spec,
        )  # fmt: skip
        prepare(run_spec, self.stores, self.folder / f"prepare-{run}")
        return run_spec

    def train(self, run_spec: RunSpec, size: int = 1, lost_at: str = "") -> runfiles.RunResult:
        """Train in a world of processes.

        Args:
            lost_at: text in the log at which the processes are killed, and then started again.
        """
        path = self.folder / f"run-spec-{run_spec.run}.json"
        path.write_text(run_spec.to_text())
        environment = dict(os.environ) | {"FINETUNE_RUN_SPEC": str(path)}
        for attempt in range(2 if lost_at else 1):
            folder = self.folder / f"{run_spec.run}-{size}-{attempt}"
            world = start_world(environment, size, folder)
            if lost_at and attempt == 0:
                world.wait_for_log(lost_at)
                world.kill()
                continue
            assert world.wait() == [0] * size, world.log.read_text()
        return runfiles.read_result(self.store, run_spec.run_uri)

    def publish(self, run_spec: RunSpec) -> PublishSummary:
        return publish(run_spec, self.stores, self.folder / f"publish-{run_spec.run}")

    @property
    def destination(self) -> str:
        return f"s3://{self._bucket}/out"

    def head(self, run_spec: RunSpec) -> Head:
        found = read_head(self.store, run_spec.run_uri)
        assert found is not None
        return found[0]

    def adapter(self, run_spec: RunSpec) -> dict[str, torch.Tensor]:
        path = self.folder / f"{run_spec.run}.safetensors"
        uri = f"{run_spec.output_uri}/adapter/adapter_model.safetensors"
        self.store.download(uri, path)
        return load_file(path)


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
