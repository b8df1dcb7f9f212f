"""Classification runs, from records to a published model that plain transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench import Bench
from classifiers import LABELS, lines, records, write_decoder, write_encoder
from peft import PeftModel
from sklearn.metrics import accuracy_score, f1_score
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

from finetune_api.run_spec import RunSpec
from finetune_trainer.prepare.pipeline import prepare
from finetune_trainer.publish.pipeline import publish
from finetune_trainer.storage.objects import Stores

pytestmark = pytest.mark.slow

TEST = records(40, seed=1)


class Job:
    """One classification job on one bucket."""

    def __init__(self, run_spec_for: Any, s3: Any, bucket: str, base: Path, tmp_path: Path) -> None:
        self.store, self.tmp_path, self._run_spec_for = s3.store(), tmp_path, run_spec_for
        self.bucket = f"s3://{bucket}"
        for path in base.iterdir():
            self.store.upload(path, f"{self.bucket}/model/{path.name}")
        self.store.put(f"{self.bucket}/train.jsonl", lines(records(320)))
        self.store.put(f"{self.bucket}/test.jsonl", lines(TEST))

    def run_spec(self, run: str, **spec: Any) -> RunSpec:
        training = {
            "epochs": 8, "batchSize": 16, "learningRate": "1e-2", "precision": "FP32",
            "microBatchTokens": 128, "dropout": "0.02", "labelSmoothing": "0.05",
            "neftuneAlpha": "0.1",
        } | spec.pop("training", {})  # fmt: skip
        run_spec: RunSpec = self._run_spec_for(
            run=run,
            **{
                "task": "SequenceClassification",
                "data": {
                    "train": [{"source": f"{self.bucket}/train.jsonl"}],
                    "test": [{"name": "opinions", "source": f"{self.bucket}/test.jsonl"}],
                    "split": {"validation": "0.1"},
                    "quality": {"contamination": "Ignore"},
                },
                "checkpoint": {"everySteps": 20, "metric": "Accuracy"},
                "training": training,
            }
            | spec,
        )
        prepare(run_spec, Stores(run_spec), self.tmp_path / f"prepare-{run}")
        return run_spec

    start = Bench.start
    finish = Bench.finish
    head = Bench.head
    kill_after_checkpoint = Bench.kill_after_checkpoint

    def published(self, run_spec: RunSpec) -> Path:
        publish(run_spec, Stores(run_spec), self.tmp_path / f"publish-{run_spec.run}")
        folder = self.tmp_path / f"got-{run_spec.run}"
        for info in self.store.list(f"{run_spec.output_uri}/"):
            self.store.download(info.uri, folder / info.uri.split(f"{run_spec.run}/", 1)[1])
        return folder


def scores(classify: Any) -> dict[str, float]:
    """Accuracy and F1 on the test records, by a transformers pipeline."""
    said = [x["label"] for x in classify([r["text"] for r in TEST], batch_size=8)]
    right = [r["label"] for r in TEST]
    return {
        "Accuracy": accuracy_score(right, said), "F1": f1_score(right, said, average="macro")
    }  # fmt: skip


def check_papers(folder: Path) -> None:
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["classes"], metrics["drawnHead"]) == (list(LABELS), True)
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "AutoModelForCausalLM" not in card
    for paper in (card, (folder / "report.html").read_text()):
        assert "the base model has random weights" in paper
        assert "2 classes: negative, positive" in paper


def test_an_encoder_with_an_adapter_learns_resumes_and_is_published(
    run_spec_for: Any, s3: Any, bucket: str, tmp_path: Path
) -> None:
    job = Job(run_spec_for, s3, bucket, write_encoder(tmp_path / "base"), tmp_path)
    spec: dict[str, Any] = {
        "method": {"type": "LoRA", "lora": {"rank": 8, "dropout": "0.05"}},
        "output": {"destination": f"{job.bucket}/out", "format": "Both"},
        "training": {"epochs": 14, "learningRate": "3e-3"},
    }
    run_spec = job.run_spec("1-whole", **spec)
    whole = job.finish(run_spec, 1, "whole")
    (found,) = whole.summary.scores
    assert found.name == "opinions"
    assert set(found.tuned) == {"Loss", "Accuracy", "Precision", "Recall", "F1"}
    assert found.base["Accuracy"] <= 0.7
    assert found.tuned["Accuracy"] >= 0.9
    assert found.tuned["Loss"] < 0.4 < found.base["Loss"]
    # Class metrics need no pass of their own, so validation always has them.
    assert {"Loss", "Accuracy", "F1"} <= whole.validation[0].overall.keys()
    assert "Perplexity" not in whole.validation[0].overall

    # Killed on two processes, resumed on one: the same curve, the same scores.
    broken = job.run_spec("2-broke", **spec)
    job.kill_after_checkpoint(broken, 2, "lost", 20)
    resumed = job.finish(broken, 1, "resumed")
    assert resumed.summary.restarts == 1
    for one, two in zip(whole.curve, resumed.curve, strict=True):
        assert two.loss == pytest.approx(one.loss, rel=1e-4)
    assert resumed.summary.scores[0].tuned["Loss"] == pytest.approx(found.tuned["Loss"], rel=1e-3)

    folder = job.published(run_spec)
    check_papers(folder)
    shown = (folder / "report.html").read_text()
    sample = next(each for each in TEST if f'<div class="text">{each["text"]}</div>' in shown)
    assert f"<dt>Reference</dt><dd>{sample['label']}</dd>" in shown
    wanted = {name: found.tuned[name] for name in ("Accuracy", "F1")}
    assert scores(pipeline("text-classification", model=str(folder / "merged"))) == wanted
    # As the model card shows.
    config = AutoConfig.from_pretrained(folder / "adapter" / "config.json")
    base = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", config=config, ignore_mismatched_sizes=True
    )
    model = PeftModel.from_pretrained(base, str(folder / "adapter"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
    assert scores(classify) == wanted


def test_a_decoder_learns_sharded_over_two_processes_and_is_published(
    run_spec_for: Any, s3: Any, bucket: str, tmp_path: Path
) -> None:
    job = Job(run_spec_for, s3, bucket, write_decoder(tmp_path / "base"), tmp_path)
    run_spec = job.run_spec("1-whole", method={"type": "Full"}, compute={"nodes": 2, "sharding":
                      "FullShard"}, training={"epochs": 6, "learningRate": "5e-3"})  # fmt: skip
    (found,) = job.finish(run_spec, 2, "whole").summary.scores
    assert found.tuned["Accuracy"] >= 0.95
    folder = job.published(run_spec)
    check_papers(folder)
    wanted = {name: found.tuned[name] for name in ("Accuracy", "F1")}
    # The base tokenizer has no padding token; a batch of texts of several lengths needs one.
    assert scores(pipeline("text-classification", model=str(folder / "merged"))) == wanted


def test_a_classifier_starts_from_its_existing_head(
    run_spec_for: Any, s3: Any, bucket: str, tmp_path: Path
) -> None:
    job = Job(run_spec_for, s3, bucket, write_encoder(tmp_path / "base"), tmp_path)
    first = job.run_spec(
        "1-first", method={"type": "Full"}, training={"epochs": 2, "learningRate": "3e-3"}
    )
    (before,) = job.finish(first, 1, "first").summary.scores
    merged = job.published(first) / "merged"
    for path in merged.iterdir():
        job.store.upload(path, f"{job.bucket}/tuned/{path.name}")
    second = job.run_spec("2-next", model={"source": f"{job.bucket}/tuned"}, training={"epochs": 1})
    (after,) = job.finish(second, 1, "next").summary.scores
    assert after.base == pytest.approx(before.tuned, rel=1e-5)
    metrics = json.loads((job.published(second) / "metrics.json").read_text())
    assert metrics["drawnHead"] is False
