"""The published model is loaded again and compared: faults between export and user are found, and
what is as it was tested passes."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import Attempt, write_model
from classifiers import lines, write_encoder
from classifiers import records as opinions
from run_specs import run_specs
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from finetune_api.results import PublishSummary
from finetune_api.run_spec import RunSpec
from finetune_trainer.failures import failure_of
from finetune_trainer.prepare.pipeline import prepare
from finetune_trainer.prepared.dataset import PreparedData
from finetune_trainer.publish import artefact, cases, export, pipeline
from finetune_trainer.publish.artefact import Artefact, ArtefactDiffers, check
from finetune_trainer.publish.cases import Compared
from finetune_trainer.publish.files import upload_folder
from finetune_trainer.storage import runfiles
from finetune_trainer.storage.objects import ObjectStore, Stores
from finetune_trainer.storage.published import PublishedFile, read_published

pytestmark = pytest.mark.slow

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
COLOURS = {"rose": "red", "grass": "green", "sky": "blue", "sun": "yellow"}


def chats(count: int) -> bytes:
    """Conversations of one or two answers, in the same words with other numbers."""
    made = []
    for i in range(count):
        messages = []
        for turn in range(1 + i % 2):
            thing = list(COLOURS)[(i + turn) % 4]
            messages += [
                {"role": "user", "content": f"{i % 29} the {thing} is"},
                {"role": "assistant", "content": COLOURS[thing]},
            ]
        made.append({"messages": messages})
    return lines(made)


def run(run_spec: RunSpec, folder: Path) -> None:
    """Prepare and train in this process."""
    prepare(run_spec, Stores(run_spec), folder / "prepare")
    Attempt(run_spec, folder / "train").train()


def put_base(store: ObjectStore, folder: Path, bucket: str) -> None:
    for path in folder.iterdir():
        store.upload(path, f"s3://{bucket}/model/{path.name}")


def write_chat_model(folder: Path) -> Path:
    # Weights as large as a trained model's, relative to its norms: rounding them matters.
    write_model(folder, initializer_range=0.1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def spec_of(bucket: str, **spec: Any) -> dict[str, Any]:
    training = {"maxSteps": 60, "batchSize": 8, "learningRate": "1e-2", "precision": "FP32",
                "microBatchTokens": 512, "maxLength": 128} | spec.pop("training", {})  # fmt: skip
    return {
        "method": {"type": "LoRA", "lora": {"rank": 8}},
        "data": {
            "train": [{"name": "chat", "source": f"s3://{bucket}/train.jsonl"}],
            "split": {"validation": "0", "test": "0.2"},
            "quality": {"contamination": "Ignore"},
        },
        "evaluation": {"baselines": {"shots": []}, "maxNewTokens": 12},
        "training": training,
    } | spec


@dataclass
class Job:
    """A LoRA run over conversations that was published as adapter and merged."""

    run_spec: RunSpec
    stores: Stores
    folder: Path
    """Its published files."""
    base: Path
    compared: Compared
    summary: PublishSummary

    def check(
        self, formats: list[str], uri: str, files: Mapping[str, PublishedFile], scratch: Path
    ) -> Any:
        task, base = self.run_spec.spec.task, self.run_spec.base_model
        found = Artefact(uri, formats, files, task, base, self.base)
        return check(found, self.compared, self.stores, scratch)


@pytest.fixture(scope="module")
def job(s3: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    folder, bucket = tmp_path_factory.mktemp("job"), f"test-{uuid.uuid4().hex[:12]}"
    store: ObjectStore = s3.store()
    store.create_bucket(bucket)
    put_base(store, write_chat_model(folder / "base"), bucket)
    store.put(f"s3://{bucket}/train.jsonl", chats(160))
    with pytest.MonkeyPatch.context() as patch:
        output = {"destination": f"s3://{bucket}/out", "format": "Both"}
        run_spec = run_specs(s3, bucket, patch)(**spec_of(bucket, output=output))
        stores = Stores(run_spec)
        run(run_spec, folder)
        summary = pipeline.publish(run_spec, stores, folder / "scratch")
        result = runfiles.read_result(store, run_spec.run_uri)
        prepared = runfiles.read_prepared(store, run_spec.run_uri)
        data = PreparedData.open(store, prepared.uri, folder / "data")
        compared = cases.tested(run_spec, store, result, data, folder / "base")
        assert compared is not None
        for info in store.list(f"{run_spec.output_uri}/"):
            name = info.uri.removeprefix(f"{run_spec.output_uri}/")
            store.download(info.uri, folder / "got" / name)
        yield Job(run_spec, stores, folder / "got", folder / "base", compared, summary)


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def wrong_alpha(folder: Path, _base: Path) -> None:
    alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    change_json(folder / "adapter_config.json", lora_alpha=alpha * 2)


def new_head(folder: Path, _base: Path) -> None:
    torch.manual_seed(1)
    change_json(folder / "config.json", tie_word_embeddings=False)
    change_weights(folder, lambda w: w.update({"lm_head.weight": torch.randn(130, 32) * 0.02}))


def lost_head(folder: Path, _base: Path) -> None:
    change_json(folder / "config.json", tie_word_embeddings=False)
    change_weights(folder, lambda w: w.pop("lm_head.weight", None))


def other_template(folder: Path, _base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE.replace("assistant: ", "")
    tokenizer.save_pretrained(folder)


def other_vocabulary(folder: Path, _base: Path) -> None:
    raw = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = raw["model"]["vocab"]
    vocabulary["e"], vocabulary["a"] = vocabulary["a"], vocabulary["e"]
    (folder / "tokenizer.json").write_text(json.dumps(raw))


def lost_stop(folder: Path, _base: Path) -> None:
    change_json(folder / "generation_config.json", eos_token_id=1)


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """Round to 4 bits as QLoRA's base is: 16 levels in each block of 64 weights."""
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True) / 7.5
    return ((blocks / scale + 0.5).round() - 0.5).mul(scale).reshape(weight.shape)


def merged_into_a_rounded_base(folder: Path, base: Path) -> None:
    before = load_file(base / "model.safetensors")

    def change(weights: dict[str, torch.Tensor]) -> None:
        for name, weight in weights.items():
            if name.endswith("proj.weight"):
                weights[name] = weight - before[name] + rounded(before[name])

    change_weights(folder, change)


def without(part: str) -> Callable[[Path, Path], None]:
    def drop(folder: Path, _base: Path) -> None:
        def change(weights: dict[str, torch.Tensor]) -> None:
            weights.pop(next(name for name in weights if part in name))

        change_weights(folder, change)

    return drop


def cut_off(folder: Path, _base: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


FAULTS: dict[str, tuple[str, Callable[[Path, Path], None], str]] = {
    "wrong alpha": ("adapter", wrong_alpha, "has loss .* tested .*allowed difference"),
    "new head": ("merged", new_head, "has loss .* tested .*allowed difference"),
    "lost tied head": ("merged", lost_head, r"weights do not hold lm_head\.weight"),
    "chat template of an adapter": ("adapter", other_template, "has chat_template "),
    "chat template": ("merged", other_template, "has chat_template "),
    "vocabulary": ("merged", other_vocabulary, "tokenizer makes .* of the text of sample"),
    "stop tokens of an adapter": ("adapter", lost_stop, "answers differ"),
    "stop tokens": ("merged", lost_stop, "answers differ"),
    "4-bit base": ("merged", merged_into_a_rounded_base, "has loss .* tested"),
    "missing tensor": ("merged", without("layers.1.mlp.down_proj"), "do not hold model.layers.1"),
    "missing norm": ("merged", without("post_attention_layernorm"), "do not hold model.layers.0"),
    "missing tensor of an adapter": ("adapter", without("lora_B"), "has loss .* tested"),
    "cut off file": ("merged", cut_off, "cannot be loaded"),
}


@pytest.mark.parametrize(("kind", "fault", "said"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_found(
    job: Job, tmp_path: Path, kind: str, fault: Callable[[Path, Path], None], said: str
) -> None:
    shutil.copytree(job.folder / kind, tmp_path / "made" / kind)
    fault(tmp_path / "made" / kind, job.base)
    uri = f"{job.run_spec.output_uri}-{uuid.uuid4().hex[:8]}"
    files = upload_folder(job.stores.default, tmp_path / "made", uri)
    with pytest.raises(ArtefactDiffers, match=rf"{uri}/{kind}: .*{said}") as caught:
        job.check([kind], uri, files, tmp_path / "scratch")
    failure = failure_of(caught.value)
    assert (failure.failure_class, failure.reason) == ("Internal", "ArtefactDiffers")
    assert not failure.retryable


def test_what_was_published_is_compared_and_reported(job: Job) -> None:
    assert len(job.compared.cases) == 16
    assert {case.text.answered > 0 for case in job.compared.cases if case.text} == {True, False}
    found = runfiles.read_evaluation(job.stores.default, job.run_spec.run_uri).artefact
    assert found is not None
    assert (found.formats, found.side, found.samples) == (["adapter", "merged"], "test", 16)
    assert (found.answers_equal, found.of, found.left_out) == (16, 16, {})
    assert found.largest_loss_difference < 1e-4
    assert json.loads((job.folder / "metrics.json").read_text())["artefact"] == found.to_json()
    for paper in ("README.md", "report.html"):
        text = (job.folder / paper).read_text()
        assert "Loaded again from object storage (adapter and merged), the model is the" in text
        assert "16 samples" in text and "16 of 16 answers equal" in text


def test_a_format_that_does_not_fit_is_left_out(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (job.folder / "merged" / "model.safetensors").stat().st_size
    monkeypatch.setattr(artefact, "capacity", lambda device, processes: 1.3 * size)
    published = read_published(job.stores.default, job.run_spec.output_uri)
    assert published is not None
    files = published[0].files
    found = job.check(["adapter", "merged"], job.run_spec.output_uri, files, tmp_path)
    assert found.formats == ["merged"]
    assert found.left_out.keys() == {"adapter"}
    assert "bytes of memory" in found.left_out["adapter"]
    assert not (tmp_path / "artefact").exists()


def test_a_model_that_differs_is_never_complete(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_spec = job.run_spec.model_copy(update={
        "spec": job.run_spec.spec.model_copy(update={"output": job.run_spec.spec.output.model_copy(
            update={"destination": f"{job.run_spec.spec.output.destination}-differs"})})
    })  # fmt: skip
    write = export.write_merged

    def faulty(*arguments: Any) -> None:
        write(*arguments)
        lost_stop(arguments[4], job.base)

    monkeypatch.setattr(export, "write_merged", faulty)
    run_uri = job.run_spec.run_uri
    monkeypatch.setattr(RunSpec, "run_uri", property(lambda _: run_uri))
    with pytest.raises(ArtefactDiffers, match="answers differ"):
        pipeline.publish(run_spec, job.stores, tmp_path)
    there = [info.uri for info in job.stores.default.list(f"{run_spec.output_uri}/")]
    assert any(uri.endswith("/merged/model.safetensors") for uri in there)
    assert not [uri for uri in there if uri.endswith("manifest.json")]


METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": {"type": "Full"}, "training": {"learningRate": "3e-3"}},
    "ia3, all samples": {
        "method": {"type": "IA3"},
        "evaluation": {"baselines": {"shots": []}, "maxNewTokens": 12, "artefactCheck": "Full"},
    },
    "prompt tuning": {"method": {"type": "PromptTuning", "prompt": {"virtualTokens": 4}}},
    "prefix tuning": {"method": {"type": "PrefixTuning", "prompt": {"virtualTokens": 4}}},
}


@pytest.mark.parametrize("spec", METHODS.values(), ids=METHODS)
def test_unchanged_models_pass(
    run_spec_for: Any, s3: Any, bucket: str, tmp_path: Path, spec: dict[str, Any]
) -> None:
    store = s3.store()
    put_base(store, write_chat_model(tmp_path / "base"), bucket)
    store.put(f"s3://{bucket}/train.jsonl", chats(96))
    training = {"maxSteps": 4} | spec.get("training", {})
    run_spec = run_spec_for(**spec_of(bucket, **(spec | {"training": training})))
    run(run_spec, tmp_path)
    pipeline.publish(run_spec, Stores(run_spec), tmp_path / "scratch")
    found = runfiles.read_evaluation(store, run_spec.run_uri).artefact
    assert found is not None
    full = run_spec.spec.evaluation.artefact_check == "Full"
    (scores,) = runfiles.read_result(store, run_spec.run_uri).summary.scores
    assert found.samples == (scores.samples if full else 16) >= 16
    assert found.answers_equal == found.of == found.samples
    assert found.largest_loss_difference < 1e-4


@pytest.mark.parametrize("test", ["0.2", "0"], ids=["tested", "without test sets"])
def test_unchanged_classifiers_pass(
    run_spec_for: Any, s3: Any, bucket: str, tmp_path: Path, test: str
) -> None:
    store = s3.store()
    put_base(store, write_encoder(tmp_path / "base"), bucket)
    store.put(f"s3://{bucket}/train.jsonl", lines(opinions(160)))
    spec = spec_of(
        bucket,
        task="SequenceClassification",
        output={"destination": f"s3://{bucket}/out", "format": "Both"},
        evaluation={},
        training={"maxSteps": 12, "maxLength": 32, "learningRate": "5e-3"},
    )
    spec["data"]["split"]["test"] = test
    run_spec = run_spec_for(**spec)
    run(run_spec, tmp_path)
    pipeline.publish(run_spec, Stores(run_spec), tmp_path / "scratch")
    found = runfiles.read_evaluation(store, run_spec.run_uri).artefact
    assert found is not None
    assert (found.formats, found.samples) == (["adapter", "merged"], 16)
    assert found.largest_loss_difference < 1e-4
    if test == "0":
        assert (found.side, found.of) == ("train", 0)
    else:
        assert (found.side, found.answers_equal, found.of) == ("test", 16, 16)


def test_an_adapter_without_test_sets_is_compared_by_training_samples_or_not_at_all(
    run_spec_for: Any, s3: Any, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = s3.store()
    put_base(store, write_chat_model(tmp_path / "base"), bucket)
    store.put(f"s3://{bucket}/train.jsonl", chats(40))
    spec = spec_of(bucket, training={"maxSteps": 4})
    spec["data"]["split"]["test"] = "0"
    run_spec = run_spec_for(**spec)
    run(run_spec, tmp_path)
    stores = Stores(run_spec)
    pipeline.publish(run_spec, stores, tmp_path / "scratch")
    found = runfiles.read_evaluation(store, run_spec.run_uri).artefact
    assert found is not None
    assert (found.formats, found.side, found.samples, found.of) == (["adapter"], "train", 16, 0)
    assert "the model is the trained one" in store.get(f"{run_spec.output_uri}/README.md").decode()

    off = run_spec.spec.evaluation.model_copy(update={"artefact_check": "Off"})
    unchecked = run_spec.model_copy(
        update={"spec": run_spec.spec.model_copy(update={"evaluation": off})}
    )
    for publishing, memory in ((unchecked, 1 << 40), (run_spec, 1)):
        monkeypatch.setattr(pipeline, "capacity", lambda device, processes, m=memory: m)
        store.delete([f"{run_spec.output_uri}/manifest.json"])
        pipeline.publish(publishing, stores, tmp_path / "again")
        found = runfiles.read_evaluation(store, run_spec.run_uri).artefact
        if publishing is unchecked:
            assert found is None
        else:
            assert found is not None and "does not fit the memory" in found.left_out["adapter"]
    told = store.get(f"{run_spec.output_uri}/README.md").decode()
    assert "Not loaded again: adapter, there is no test set" in told
