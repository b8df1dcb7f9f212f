"""Publishing: the output loads with plain transformers and peft, and is complete or absent."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from worlds import start_world

from finetune_api.results import PublishSummary
from finetune_api.run_spec import RunSpec
from finetune_trainer.engine.checkpointing.dcp_storage import METADATA
from finetune_trainer.failures import UserError
from finetune_trainer.prepare.pipeline import prepare
from finetune_trainer.publish.files import move_latest
from finetune_trainer.publish.pipeline import publish
from finetune_trainer.storage import runfiles
from finetune_trainer.storage.current import CurrentPointer
from finetune_trainer.storage.objects import ObjectStore, Stores
from finetune_trainer.storage.run_head import CorruptCheckpoint


class Trained:
    """A run trained in one process."""

    def __init__(self, run_spec: RunSpec, tmp_path: Path) -> None:
        self.run_spec = run_spec
        self.stores = Stores(run_spec)
        self.store: ObjectStore = self.stores.default
        prepare(run_spec, self.stores, tmp_path / "prepare")
        path = tmp_path / "run-spec.json"
        path.write_text(run_spec.to_text())
        world = start_world(
            dict(os.environ) | {"FINETUNE_RUN_SPEC": str(path)}, 1, tmp_path / "world"
        )
        assert world.wait() == [0], world.log.read_text()

    def json(self, name: str) -> Any:
        return json.loads(self.store.get(f"{self.run_spec.output_uri}/{name}"))

    def fetch(self, folder: Path) -> Path:
        for info in self.store.list(f"{self.run_spec.output_uri}/"):
            self.store.download(info.uri, folder / info.uri.split(f"{self.run_spec.run}/", 1)[1])
        return folder


SPEC: dict[str, Any] = {
    "training": {"maxSteps": 6, "batchSize": 8, "learningRate": "1e-2", "precision": "FP32"},
    "evaluation": {"maxNewTokens": 4, "maxSamples": 8},
}


@pytest.fixture
def trained_for(run_spec_for: Any, bucket: str, tiny_base: Path, tmp_path: Path) -> Any:
    def make(base: Path = tiny_base / "model", **spec: Any) -> Trained:
        given = {
            "model": {"source": f"s3://{bucket}/model"},
            "data": {"train": [{"name": "intent", "source": f"s3://{bucket}/train.jsonl"}]},
        }
        run_spec = run_spec_for(**{**SPEC, **given, **spec})
        store = Stores(run_spec).default
        for path in base.iterdir():
            store.upload(path, f"s3://{bucket}/model/{path.name}")
        store.upload(tiny_base / "data" / "intent-train.jsonl", f"s3://{bucket}/train.jsonl")
        return Trained(run_spec, tmp_path)

    return make


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    batch = tokenizer("Hello, this is Anna. My lamp is broken.\nLabel:", return_tensors="pt")
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=batch["input_ids"]).logits
    return found


def configuration(model: Any) -> dict[str, Any]:
    return {k: v for k, v in model.config.to_dict().items() if k != "_name_or_path"}


def test_lora_is_published_as_adapter_and_merged(
    trained_for: Any, bucket: str, tiny_base: Path, tmp_path: Path, one_thread: None
) -> None:
    run: Trained = trained_for(
        method={"type": "LoRA", "lora": {"rank": 4, "dropout": "0.1"}},
        output={"destination": f"s3://{bucket}/out", "format": "Both"},
    )
    summary = publish(run.run_spec, run.stores, tmp_path / "scratch")
    folder = run.fetch(tmp_path / "got")

    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    base = AutoModelForCausalLM.from_pretrained(tiny_base / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    assert configuration(merged) == configuration(base)
    assert merged.generation_config.eos_token_id == tokenizer.eos_token_id
    base_logits = logits(base, tokenizer)
    adapted = logits(PeftModel.from_pretrained(base, str(folder / "adapter")), tokenizer)
    assert torch.allclose(logits(merged, tokenizer), adapted, atol=1e-4)
    assert not torch.allclose(base_logits, adapted, atol=1e-1)

    check_manifest(folder, summary)
    latest = json.loads(run.store.get(f"s3://{bucket}/out/latest.json"))
    assert (latest["run"], latest["digest"]) == (run.run_spec.run, summary.digest)
    whole = (folder / "merged" / "model.safetensors").stat().st_size
    assert whole == pytest.approx(summary.full_copy_bytes, rel=0.05)
    sizes = run.json("metrics.json")["bytes"]
    assert sizes["fullCopy"] == summary.full_copy_bytes
    assert (
        sizes["adapter"]
        < sizes["merged"]
        == sum(path.stat().st_size for path in (folder / "merged").iterdir())
    )
    told = run.json("metrics.json")["test"]
    names = ["Base", "Base 1-shot", "Base 4-shot", "Tuned"]
    assert [row["row"] for row in told[0]["rows"]] == names
    for row in told[0]["rows"][:-1]:
        assert row["comparisons"]["Accuracy"]["pAdjusted"] >= row["comparisons"]["Accuracy"]["p"]
    assert told[0]["recommendation"]["metric"] == "Accuracy"
    assert summary.scores[0].comparisons["Accuracy"].effect == pytest.approx(
        told[0]["gain"]["Accuracy"]
    )
    assert summary.recommendation is not None
    scores = runfiles.read_result(run.store, run.run_spec.run_uri).summary.scores
    assert [found["tuned"] for found in told] == [found.tuned for found in scores]
    assert told[0]["gain"]["Loss"] == scores[0].tuned["Loss"] - scores[0].base["Loss"]

    # A second publish finds the output of the first and writes nothing.
    before = {info.uri: info.etag for info in run.store.list(f"s3://{bucket}/out/")}
    assert publish(run.run_spec, run.stores, tmp_path / "again") == summary
    assert before == {info.uri: info.etag for info in run.store.list(f"s3://{bucket}/out/")}
    assert not (tmp_path / "again").exists()

    # With format Adapter, the base weights are not read, and the adapter files are identical.
    run.store.delete([f"{run.run_spec.output_uri}/manifest.json"])
    output = run.run_spec.spec.output.model_copy(update={"format": "Adapter"})
    spec = run.run_spec.spec.model_copy(update={"output": output})
    alone = run.run_spec.model_copy(update={"spec": spec})
    assert publish(alone, run.stores, tmp_path / "alone").formats == ["adapter"]
    assert not list((tmp_path / "alone" / "model").glob("*.safetensors"))
    result = runfiles.read_result(run.store, run.run_spec.run_uri)
    metadata = pickle.loads(run.store.get(f"{result.summary.checkpoint}/{METADATA}"))
    saved = metadata.state_dict_metadata
    weights = [name for name in saved if name.startswith("model.")]
    assert weights and all("lora_" in name for name in weights), "frozen weights in a checkpoint"
    for path in (folder / "adapter").iterdir():
        name = f"{run.run_spec.output_uri}/adapter/{path.name}"
        assert run.store.get(name) == path.read_bytes(), path.name


def check_manifest(folder: Path, summary: PublishSummary) -> None:
    """Check the manifest against every file, and the summary against both."""
    text = (folder / "manifest.json").read_bytes()
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    listed = json.loads(text)["files"]
    assert {*listed, "manifest.json"} == set(files)
    for name, expected in listed.items():
        content = files[name].read_bytes()
        assert len(content) == expected["bytes"]
        assert hashlib.sha256(content).hexdigest() == expected["sha256"]
    assert summary.digest == hashlib.sha256(text).hexdigest()
    assert summary.bytes == sum(path.stat().st_size for path in files.values())
    assert summary.formats == ["adapter", "merged"]


def test_full_tuning_in_bfloat16_publishes_a_bfloat16_model(
    trained_for: Any, bucket: str, tiny_base: Path, tmp_path: Path, one_thread: None
) -> None:
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(tiny_base / "model", dtype=torch.bfloat16).save_pretrained(
        half
    )
    AutoTokenizer.from_pretrained(tiny_base / "model").save_pretrained(half)
    run: Trained = trained_for(base=half, method={"type": "Full"})
    publish(run.run_spec, run.stores, tmp_path / "scratch")
    folder = run.fetch(tmp_path / "got")
    model = AutoModelForCausalLM.from_pretrained(folder / "merged")
    before = AutoModelForCausalLM.from_pretrained(half)
    tokenizer = AutoTokenizer.from_pretrained(folder / "merged")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not torch.allclose(logits(model, tokenizer), logits(before, tokenizer), atol=1e-1)
    assert not (folder / "adapter").exists()

    # A corrupt checkpoint fails the publish, and no manifest.json is left.
    run.store.delete([f"{run.run_spec.output_uri}/manifest.json"])
    result = runfiles.read_result(run.store, run.run_spec.run_uri)
    weights = f"{result.summary.checkpoint}/shard-00000"
    run.store.put(weights, b"others")
    with pytest.raises(CorruptCheckpoint):
        publish(run.run_spec, run.stores, tmp_path / "scratch")
    assert run.store.head(f"{run.run_spec.output_uri}/manifest.json") is None


def test_a_run_without_a_result_is_refused(run_spec_for: Any, tmp_path: Path) -> None:
    run_spec: RunSpec = run_spec_for()
    with pytest.raises(UserError) as caught:
        publish(run_spec, Stores(run_spec), tmp_path)
    assert caught.value.reason == "NotTrained"
    assert f"{run_spec.run_uri}/result.json" in caught.value.message


def test_latest_never_moves_to_an_older_run(run_spec_for: Any, bucket: str) -> None:
    def publish_as(run: str, uid: str) -> str:
        raw: RunSpec = run_spec_for(run=run)
        run_spec = raw.model_copy(update={"job": raw.job.model_copy(update={"uid": uid})})
        summary = PublishSummary(uri=run_spec.output_uri, digest=run, formats=[], bytes=0)
        store = Stores(run_spec).default
        move_latest(store, run_spec, summary)
        return str(json.loads(store.get(f"s3://{bucket}/out/latest.json"))["run"])

    assert publish_as("2-aaaaa", "aaaaa") == "2-aaaaa"
    assert publish_as("1-aaaaa", "aaaaa") == "2-aaaaa"
    assert publish_as("10-aaaaa", "aaaaa") == "10-aaaaa"
    assert publish_as("9-aaaaa", "aaaaa") == "10-aaaaa"
    assert publish_as("1-bbbbb", "bbbbb") == "1-bbbbb", "a re-created job replaces the old one"
    Stores(run_spec_for()).default.put(f"s3://{bucket}/out/latest.json", b'{"mine": true}')
    assert publish_as("2-bbbbb", "bbbbb") == "2-bbbbb", "a file that no run has written is replaced"


GATED: dict[str, Any] = {
    "evaluation": {
        "maxNewTokens": 4,
        "maxSamples": 24,
        "baselines": {"shots": []},
        "gates": [
            {"metric": "Loss", "operator": "BetterThan"},
            {"dataSet": "general", "metric": "Loss", "operator": "WorsensAtMost", "value": "9"},
        ],
    },
}


def test_gates_and_the_current_model_decide_what_is_used(
    trained_for: Any, run_spec_for: Any, bucket: str, tiny_base: Path, tmp_path: Path,
    one_thread: None,
) -> None:  # fmt: skip
    def train(run: str, steps: int, rate: str) -> Trained:
        (tmp_path / run).mkdir()
        run_spec = run_spec_for(
            run=run, **GATED,
            model={"source": f"s3://{bucket}/model"},
            training={**SPEC["training"], "maxSteps": steps, "learningRate": rate},
            data={
                "train": [{"name": "intent", "source": f"s3://{bucket}/train.jsonl"}],
                "test": [{"name": "support", "source": f"s3://{bucket}/test.jsonl"}],
                "retention": [{"name": "general", "source": f"s3://{bucket}/general.jsonl",
                               "format": "Text"}],
            },
            output={"destination": f"s3://{bucket}/out", "current": {}},
        )  # fmt: skip
        return Trained(run_spec, tmp_path / run)

    store = Stores(run_spec_for()).default
    for path in (tiny_base / "model").iterdir():
        store.upload(path, f"s3://{bucket}/model/{path.name}")
    for name in ("train", "test"):
        path = tiny_base / "data" / f"intent-{name}.jsonl"
        store.upload(path, f"s3://{bucket}/{name}.jsonl")
    texts = [{"text": f"The lamp number {n} stands on the table in the room."} for n in range(30)]
    store.put(f"s3://{bucket}/general.jsonl", "\n".join(map(json.dumps, texts)).encode())
    pointer = CurrentPointer(store, f"s3://{bucket}/out")

    # The first run passes its gates, and there is nothing to replace.
    good = train("1-good", 30, "1e-2")
    first = publish(good.run_spec, good.stores, tmp_path / "first")
    assert (first.held, first.became_current) == (None, True)
    main = first.main_result
    assert main is not None and (main.data_set, main.metric) == ("support", "Accuracy")
    assert main.gain.startswith("+") and main.current_gap is None
    current = pointer.read().file.current
    assert current is not None and (current.run, current.digest) == ("1-good", first.digest)
    assert "held" not in good.json("manifest.json")
    support, general = good.json("metrics.json")["test"]
    assert (support["retention"], general["retention"]) == (False, True)
    assert general["recommendation"] is None
    lines = good.store.get(f"{good.run_spec.output_uri}/predictions.jsonl").splitlines()
    read = [json.loads(line) for line in lines]
    assert sum(line["dataSet"] == "general" for line in read) == 30
    assert set(read[0]["answers"]) == {"Base", "Tuned"} and read[0]["prompt"] and read[0]["loss"]

    # The second one learns nothing: held by a gate, and the current model stays.
    poor = train("2-poor", 1, "1e-9")
    second = publish(poor.run_spec, poor.stores, tmp_path / "second")
    assert second.became_current is False and second.held is not None
    assert "support Loss BetterThan: against Base" in second.held
    assert "a gain of evaluation.minEffect is ruled out" in second.held
    assert "current model 1-good: support Accuracy" in second.held
    assert poor.json("manifest.json")["held"] == second.held
    assert (poor.fetch(tmp_path / "got") / "report.html").read_text().count("missed") >= 2
    row = poor.json("metrics.json")["test"][0]["rows"][-1]
    tuned = good.json("metrics.json")["test"][0]["tuned"]
    assert (row["row"], row["samples"]) == ("Current", 24)
    lost = poor.json("metrics.json")["test"][0]["tuned"]["Accuracy"] - tuned["Accuracy"]
    assert second.main_result is not None
    assert second.main_result.current_gap == pytest.approx(lost)
    assert row["metrics"]["Accuracy"]["value"] == tuned["Accuracy"]
    assert row["metrics"]["Loss"]["value"] == pytest.approx(tuned["Loss"], rel=1e-6)
    file = pointer.read().file
    assert file.current is not None and file.current.run == "1-good"
    assert file.decided == {"support": 2}

    # Published again: found as it is, and decided once.
    assert publish(poor.run_spec, poor.stores, tmp_path / "again") == second
    assert pointer.read().file == file


@pytest.mark.parametrize(
    ("gate", "because"),
    [
        ({"dataSet": "tone", "metric": "Loss", "operator": "BetterThan"},
         r"gates\[0\]\.dataSet: tone is the name of no test or retention set; there are: intent"),
        ({"metric": "Bleu", "operator": "BetterThan"},
         r"gates\[0\]\.metric: Bleu is measured on no test set; sets that have it: none"),
        ({"metric": "Accuracy", "operator": "BetterThan", "row": "FewShot"},
         r"gates\[0\]\.row: set intent has no row FewShot, only Base, Current"),
    ],
)  # fmt: skip
def test_a_gate_on_what_is_not_measured_is_refused(
    gate: dict[str, Any], because: str, trained_for: Any
) -> None:
    evaluation = {"gates": [gate], "baselines": {"maxSamples": 1}, "maxNewTokens": 2000}
    with pytest.raises(UserError, match=because) as failed:
        trained_for(evaluation=evaluation)
    assert failed.value.reason == "GateNotMeasured"
