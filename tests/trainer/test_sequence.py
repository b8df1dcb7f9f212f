"""Runs based on published outputs of other runs: merged bases, summed adapters, lineage."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import spec_of, tiny_llama
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from test_publish import SPEC, Trained
from transformers import AutoModelForCausalLM
from tuning import logits

from finetune_api.results import Ancestor
from finetune_api.run_spec import CONTRACT_VERSION, JobIdentity, RunSpec, tuned_base
from finetune_api.sources import ModelLocation
from finetune_trainer.engine.adaptersum import add_adapters, check_sum
from finetune_trainer.engine.base import BaseFiles, check_ties, fetch_base, merge_adapter
from finetune_trainer.failures import UserError
from finetune_trainer.prepare.pipeline import prepare
from finetune_trainer.publish.pipeline import publish
from finetune_trainer.storage import runfiles
from finetune_trainer.storage.objects import Stores
from finetune_trainer.storage.published import Base, Manifest, find_base
from finetune_trainer.storage.weight_reader import Weights


class Chain:
    """Jobs of one namespace, each based on an earlier one."""

    def __init__(self, run_spec_for: Any, bucket: str, tiny_base: Path, tmp_path: Path) -> None:
        self._run_spec_for, self._bucket, self._tmp_path = run_spec_for, bucket, tmp_path
        self.store = Stores(run_spec_for()).default
        for path in (tiny_base / "model").iterdir():
            self.store.upload(path, f"s3://{bucket}/model/{path.name}")
        self.store.upload(tiny_base / "data" / "intent-train.jsonl", f"s3://{bucket}/train.jsonl")

    def run_spec(self, name: str, before: Trained | None = None, **spec: Any) -> RunSpec:
        """Return a job's run spec; ``before`` is the run whose model the job refers to."""
        if before is not None:
            spec["model"] = {"fineTuneJobRef": {"name": before.run_spec.job.name}}
        run_spec: RunSpec = self._run_spec_for(
            job=name,
            **SPEC | {"training": SPEC["training"] | {"maxSteps": 3}},
            data={"train": [{"name": "intent", "source": f"s3://{self._bucket}/train.jsonl"}]},
            output={"destination": f"s3://{self._bucket}/{name}", **spec.pop("output", {})},
            **spec,
        )
        if before is None:
            return run_spec
        text = self.store.get(f"{before.run_spec.output_uri}/manifest.json")
        base = tuned_base(before.run_spec, file_digest(text), run_spec.spec)
        return run_spec.model_copy(update={"base": base})

    def run(self, name: str, before: Trained | None = None, **spec: Any) -> Trained:
        folder = self._tmp_path / name
        folder.mkdir()
        trained = Trained(self.run_spec(name, before, **spec), folder)
        publish(trained.run_spec, trained.stores, folder / "scratch")
        trained.fetch(folder / "got")
        return trained

    def got(self, name: str, kind: str) -> Path:
        return self._tmp_path / name / "got" / kind

    def loss(self, run: Trained, which: str) -> float:
        return float(run.json("metrics.json")["test"][0][which]["Loss"])


def file_digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.slow
def test_a_chain_of_four_runs(
    run_spec_for: Any, bucket: str, tiny_base: Path, tmp_path: Path
) -> None:
    chain = Chain(run_spec_for, bucket, tiny_base, tmp_path)
    base = tiny_base / "model"
    plain = AutoModelForCausalLM.from_pretrained(base)
    base_logits = logits(plain)

    one = chain.run("one", method={"type": "LoRA", "lora": {"rank": 4}})
    with pytest.raises(UserError) as caught:
        prepare(
            chain.run_spec("dora", one, method={"type": "LoRA", "lora": {"useDora": True}}),
            one.stores, tmp_path / "refused",
        )  # fmt: skip
    assert caught.value.reason == "NoSumOfAdapters"

    # LoRA on a run that published only an adapter: the new adapter is for the first model and
    # contains the sum of both adapters.
    method = {"type": "LoRA", "lora": {"rank": 2, "useRslora": True, "targetModules": ["q_proj"]}}
    two = chain.run("two", one, method=method, output={"format": "Both"})
    assert chain.loss(two, "base") == pytest.approx(chain.loss(one, "tuned"), abs=1e-5)
    summed = logits(PeftModel.from_pretrained(plain, str(chain.got("two", "adapter"))))
    whole = logits(AutoModelForCausalLM.from_pretrained(chain.got("two", "merged")))
    torch.testing.assert_close(summed, whole, atol=1e-4, rtol=1e-4)
    first = AutoModelForCausalLM.from_pretrained(base)
    first = logits(PeftModel.from_pretrained(first, str(chain.got("one", "adapter"))))
    assert (summed - first).abs().max() > 1e-2 < (first - base_logits).abs().max()
    config = json.loads((chain.got("two", "adapter") / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (6, f"s3://{bucket}/model")

    lineage = two.json("metrics.json")["lineage"]
    ancestor = {
        "uri": one.run_spec.output_uri, "job": "one", "run": "1-abcde", "method": "LoRA",
        "digest": file_digest(one.store.get(f"{one.run_spec.output_uri}/manifest.json")),
        "formats": ["adapter"],
    }  # fmt: skip
    assert lineage == [{"uri": f"s3://{bucket}/model", "formats": []}, ancestor]
    assert [a.to_json() for a in runfiles.read_result(two.store, two.run_spec.run_uri).lineage] == (
        lineage
    )
    card = two.store.get(f"{two.run_spec.output_uri}/README.md").decode()
    assert f"| 2 | `{one.run_spec.output_uri}` | one 1-abcde | LoRA | adapter |" in card
    assert f"it is loaded on `s3://{bucket}/model` alone" in card

    # Full on an adapter, by its published URI; then LoRA on the merged model that this published.
    three = chain.run(
        "three", model={"source": one.run_spec.output_uri}, method={"type": "Full"}
    )  # fmt: skip
    assert chain.loss(three, "base") == pytest.approx(chain.loss(one, "tuned"), abs=1e-5)
    assert three.json("manifest.json")["baseModel"] == f"s3://{bucket}/model"
    four = chain.run("four", three, method={"type": "LoRA", "lora": {"rank": 2}})
    assert chain.loss(four, "base") == pytest.approx(chain.loss(three, "tuned"), abs=1e-5)
    config = json.loads((chain.got("four", "adapter") / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"{three.run_spec.output_uri}/merged"
    assert [a.get("job") for a in four.json("metrics.json")["lineage"]] == [None, "one", "three"]
    assert "matrix" in two.json("metrics.json") and one.json("metrics.json")["matrix"] is None
    matrix = four.json("metrics.json")["matrix"]
    assert matrix["models"][-3:] == ["one 1-abcde", "three 1-abcde", "four 1-abcde"]
    (column,) = matrix["columns"]
    (test,) = four.json("metrics.json")["test"]
    metric = column["metric"]
    assert column["samples"] == test["samples"]
    assert column["values"][-3:] == pytest.approx(
        [one.json("metrics.json")["test"][0]["tuned"][metric], test["base"][metric],
         test["tuned"][metric]], abs=1e-5)  # fmt: skip
    assert matrix["models"][column["own"]] == "one 1-abcde" and column["transfer"] is not None
    page = four.store.get(f"{four.run_spec.output_uri}/report.html").decode()
    assert "The sequence of runs" in page and "three 1-abcde" in page
    assert (
        "adapters of the runs before"
        not in four.store.get(f"{four.run_spec.output_uri}/README.md").decode()
    )


def save_adapter(base: Path, folder: Path, **config: Any) -> Path:
    """Save an adapter with random weights."""
    torch.manual_seed(config.pop("seed", 0))
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **config),
    )
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(tie_word_embeddings=False).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"r": 4, "lora_alpha": 8}, {"r": 2, "lora_alpha": 3}),
        ({"r": 4, "use_rslora": True}, {"r": 4, "lora_alpha": 6 * 2**0.5, "use_rslora": True}),
        ({"r": 2, "target_modules": ["q_proj"]}, {"r": 3, "target_modules": ["down_proj"]}),
        ({"r": 2, "target_modules": ["embed_tokens"], "lora_alpha": 0.02}, {"r": 3}),
    ],
)
def test_a_sum_of_adapters_equals_both_applied_in_turn(
    base: Path, tmp_path: Path, one: dict[str, Any], two: dict[str, Any]
) -> None:
    every = {"target_modules": ["q_proj", "k_proj", "up_proj"], "lora_alpha": 64}
    first = save_adapter(base, tmp_path / "one", seed=1, **every | one)
    second = save_adapter(base, tmp_path / "two", seed=2, **every | two)
    model = AutoModelForCausalLM.from_pretrained(base)
    base_logits = logits(model)
    model = PeftModel.from_pretrained(model, str(first)).merge_and_unload()
    before = logits(model)
    assert (before - base_logits).abs().max() > 1e-2
    expected = logits(PeftModel.from_pretrained(model, str(second)))
    assert (expected - before).abs().max() > 1e-2

    add_adapters(first, second, second)
    plain = AutoModelForCausalLM.from_pretrained(base)
    found = logits(PeftModel.from_pretrained(plain, str(second)))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("end", ["embed_tokens", "lm_head"])
def test_an_adapter_of_only_one_tied_weight_is_refused(
    base: Path, tmp_path: Path, end: str
) -> None:
    adapter = save_adapter(base, tmp_path / "a", r=2, target_modules=[end])
    check_ties(base, adapter, "s3://out/1-a")
    tiny_llama(tie_word_embeddings=True).config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"s3://out/1-a: .*tie_word_embeddings"):
        check_ties(tmp_path, adapter, "s3://out/1-a")
    other = save_adapter(base, tmp_path / "b", r=2, target_modules=["q_proj"])
    check_ties(tmp_path, other, "s3://out/1-a")


def test_merging_is_not_rounded_and_keeps_config_files(base: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(half)
    (half / "generation_config.json").write_text('{"temperature": 0.5, "eos_token_id": 7}')
    adapter = save_adapter(base, tmp_path / "adapter", r=4, target_modules=["q_proj"])
    merge_adapter(half, Weights.of_folder(half), adapter, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32)
    expected = logits(PeftModel.from_pretrained(model, str(adapter)))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (half / name).read_bytes()


def run_spec_of(spec: Any) -> RunSpec:
    job = JobIdentity(namespace="default", name="job", uid="abcde")
    return RunSpec(version=CONTRACT_VERSION, job=job, run="1-abcde", spec=spec)


def over(adapter: Path) -> BaseFiles:
    """Return the files of a base that contains an adapter of job `before`."""
    place = ModelLocation(source="s3://out/1-a/adapter")
    lineage = (Ancestor(uri="s3://b"), Ancestor(uri="s3://out/1-a", job="before", method="LoRA"))
    return BaseFiles(Base(ModelLocation(source="s3://b"), lineage, place), adapter, adapter)


@pytest.mark.parametrize(
    ("method", "remedies"),
    [
        ({"type": "LoRA", "lora": {"useDora": True}}, ["set spec.output.format: Merged", "Both"]),
        ({"type": "IA3"}, ["set spec.output.format: Merged", "publish job before"]),
        ({"type": "PromptTuning"}, ["; publish job before with output.format: Both"]),
        ({"type": "LoRA"}, []),
    ],
)
def test_adapters_that_cannot_be_summed_are_refused(
    base: Path, tmp_path: Path, method: dict[str, Any], remedies: list[str]
) -> None:
    lora = over(save_adapter(base, tmp_path / "a", r=2, target_modules=["q_proj"]))
    run_spec = run_spec_of(spec_of(method))
    if not remedies:
        check_sum(run_spec, lora)
        dora = save_adapter(base, tmp_path / "d", r=2, target_modules=["q_proj"], use_dora=True)
        with pytest.raises(UserError, match="only plain LoRA adapters"):
            check_sum(run_spec, over(dora))
        scales = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base),
            IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
        )
        scales.save_pretrained(str(tmp_path / "i"))
        with pytest.raises(UserError, match="only plain LoRA adapters"):
            check_sum(run_spec, over(tmp_path / "i"))
        return
    with pytest.raises(UserError) as caught:
        check_sum(run_spec, lora)
    assert caught.value.reason == "NoSumOfAdapters"
    assert all(remedy in caught.value.message for remedy in remedies)
    assert ("Merged" in caught.value.message) is (method["type"] != "PromptTuning")
    if method["type"] != "PromptTuning":
        output = run_spec.spec.output.model_copy(update={"format": "Merged"})
        merged = run_spec.spec.model_copy(update={"output": output})
        check_sum(run_spec.model_copy(update={"spec": merged}), lora)


def put_manifest(run_spec: RunSpec, **changes: Any) -> bytes:
    """Write and return a manifest of another job at the base model of a run spec."""
    raw: dict[str, Any] = {
        "run": "1-a", "job": run_spec.job, "base_model": "s3://b", "method": "LoRA", "files": {},
        "lineage": [Ancestor(uri="s3://b")], "checkpoint": "s3://c", "formats": ["adapter"],
    }  # fmt: skip
    text = Manifest(**raw | changes).to_text()
    Stores(run_spec).default.put(f"{run_spec.base_model.source}/manifest.json", text)
    return text


def test_a_missing_or_changed_base_model_is_refused(run_spec_for: Any, bucket: str) -> None:
    before: RunSpec = run_spec_for(job="before")
    raw: RunSpec = run_spec_for(model={"fineTuneJobRef": {"name": "before"}})
    run_spec = raw.model_copy(update={"base": tuned_base(before, "other", raw.spec)})
    stores = Stores(run_spec)
    for reason, remedy in (("ModelNotFound", "Publish it again"), ("BaseChanged", "rerunToken")):
        with pytest.raises(UserError, match=remedy) as caught:
            find_base(run_spec, stores)
        assert caught.value.reason == reason
        text = put_manifest(run_spec)
    known = tuned_base(before, file_digest(text), raw.spec)
    found = find_base(run_spec.model_copy(update={"base": known}), stores)
    assert found.model.source == "s3://b" and found.adapter is not None


def test_prefix_vectors_cannot_be_a_base(run_spec_for: Any, bucket: str, tmp_path: Path) -> None:
    run_spec: RunSpec = run_spec_for(model={"source": f"s3://{bucket}/out/1-a"})
    put_manifest(run_spec, method="PrefixTuning")
    with pytest.raises(UserError, match="Tune the first model by LoRA") as caught:
        fetch_base(run_spec, Stores(run_spec), tmp_path, weights=False)
    assert caught.value.reason == "NotMergeable"


def test_a_manifest_of_another_program_is_ignored(run_spec_for: Any, bucket: str) -> None:
    run_spec: RunSpec = run_spec_for()
    Stores(run_spec).default.put(f"{run_spec.base_model.source}/manifest.json", b'{"name": "app"}')
    assert find_base(run_spec, Stores(run_spec)).lineage == (
        Ancestor(uri=run_spec.base_model.source),
    )
