"""Text classification in the engine: the head, padded micro-batches, every method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from classifiers import SHAPE, documents, write_decoder, write_encoder
from engine import CPU
from peft import PeftModel
from torch import nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from finetune_api.methods import METHODS
from finetune_api.sources import ModelLocation
from finetune_api.spec import FineTuneJobSpec, parse_spec
from finetune_trainer.engine.base import BaseFiles, check_headless
from finetune_trainer.engine.checkpointing.dcp import load_state, save_state, state_of
from finetune_trainer.engine.checkpointing.staging import stage
from finetune_trainer.engine.classification import (
    ClassLoss,
    build_padded_classes,
    class_losses,
    head_names,
)
from finetune_trainer.engine.flops import work_of
from finetune_trainer.engine.loss import micro_batch_losses
from finetune_trainer.engine.model import build_base, load_tokenizer, purpose_of
from finetune_trainer.engine.optimizers import split
from finetune_trainer.engine.packing.dropout import KeyedDropout
from finetune_trainer.engine.packing.layout import layout_context
from finetune_trainer.engine.parameters import optimizer_groups, parameter_counts
from finetune_trainer.engine.tuning.methods import apply_method
from finetune_trainer.failures import UserError
from finetune_trainer.publish.export import tuned_model, write_adapter, write_merged
from finetune_trainer.storage.published import Base
from finetune_trainer.storage.weight_reader import Weights

CLASSES = ["bad", "good", "so-so"]
LENGTHS = [9, 30, 4, 17, 22]


def spec_of(method: dict[str, Any], **training: Any) -> FineTuneJobSpec:
    return parse_spec(
        {
            "task": "SequenceClassification",
            "model": {"source": "s3://models/base"},
            "data": {"train": [{"source": "s3://data/a.jsonl"}]},
            "output": {"destination": "s3://models/tuned"},
            "method": method,
            "training": {"weightDecay": "0.01"} | training,
        }
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    distilled = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}
    return {
        "bert": write_encoder(root / "bert"),
        "roberta": write_encoder(root / "roberta", "roberta", bos_token_id=2, eos_token_id=3),
        "distilbert": write_encoder(root / "distilbert", "distilbert", **distilled),
        "electra": write_encoder(root / "electra", "electra", embedding_size=32),
        "llama": write_decoder(root / "llama"),
    }


def model_of(folder: Path, spec: FineTuneJobSpec, classes: list[str] = CLASSES) -> Any:
    base = build_base(folder, torch.float32, purpose=purpose_of(spec, classes))
    return apply_method(base, spec)


def micro_batch_of(indices: list[int], step: int = 0) -> Any:
    made = documents(LENGTHS)
    return build_padded_classes(
        [made[i] for i in indices], indices, numbers=indices, seed=3, step=step, device=CPU
    )


KINDS = ["bert", "roberta", "distilbert", "electra", "llama"]


@pytest.mark.parametrize("kind", KINDS)
def test_loss_of_a_document_does_not_depend_on_its_micro_batch(
    folders: dict[str, Path], kind: str
) -> None:
    spec = spec_of({"type": "Full"})
    model = model_of(folders[kind], spec)
    together = micro_batch_losses(ClassLoss(model).eval(), micro_batch_of([0, 1, 2, 3, 4]))
    plain = []
    for document in documents(LENGTHS):  # as transformers runs a single document
        with torch.no_grad():
            ids = torch.from_numpy(document.ids.astype("int64"))[None]
            logits = model.eval()(input_ids=ids).logits
        plain.append(class_losses(logits, torch.tensor([document.label])))
    torch.testing.assert_close(together, torch.cat(plain), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_and_noise_of_a_document_do_not_depend_on_its_micro_batch(
    folders: dict[str, Path], kind: str
) -> None:
    spec = spec_of({"type": "LoRA", "lora": {"dropout": "0.1"}}, dropout="0.2", neftuneAlpha="5")
    loss = ClassLoss(model_of(folders[kind], spec)).train()

    def losses(micro_batches: list[list[int]], step: int = 0) -> torch.Tensor:
        found = {}
        for indices in micro_batches:
            found |= dict(
                zip(indices, micro_batch_losses(loss, micro_batch_of(indices, step)), strict=True)
            )
        return torch.stack([found[i] for i in range(5)])

    together = losses([[0, 1, 2, 3, 4]])
    torch.testing.assert_close(losses([[4, 2], [1], [3, 0]]), together, atol=2e-6, rtol=1e-5)
    assert (losses([[0, 1, 2, 3, 4]], step=1) - together).abs().min() > 1e-5
    assert not torch.allclose(
        micro_batch_losses(loss.eval(), micro_batch_of([0, 1, 2, 3, 4])), together
    )


def test_dropout_of_pooled_outputs_is_keyed_by_document(folders: dict[str, Path]) -> None:
    model = model_of(folders["bert"], spec_of({"type": "Full"}, dropout="0.5"))
    assert isinstance(model.dropout, KeyedDropout)
    pooled = torch.ones(3, 400)
    with layout_context(micro_batch_of([0, 1, 2]).layout):
        dropped = model.dropout.train()(pooled)
    assert [round(x, 1) for x in (dropped == 0).float().mean(1).tolist()] == [0.5] * 3
    with layout_context(micro_batch_of([2, 0]).layout):
        assert torch.equal(model.dropout(pooled[:2]), dropped[[2, 0]])


def test_an_empty_micro_batch_takes_part_and_has_zero_gradients(folders: dict[str, Path]) -> None:
    model = model_of(folders["bert"], spec_of({"type": "Full"}))
    micro_batch = build_padded_classes([], [], seed=0, step=0, device=CPU)
    loss = ClassLoss(model).train()
    with layout_context(micro_batch.layout):
        loss(micro_batch).tokens.sum().backward()
    assert micro_batch.labels.numel() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    assert loss(micro_batch, with_logits=True).logits.shape == (0, 3)


def test_smoothing_is_over_the_classes_and_only_while_training(folders: dict[str, Path]) -> None:
    model = model_of(folders["bert"], spec_of({"type": "Full"}))
    micro_batch = micro_batch_of([0, 1])
    logits = ClassLoss(model)(micro_batch, with_logits=True).logits
    chance = -logits.log_softmax(-1)
    own = chance.gather(1, micro_batch.labels[:, None])[:, 0]
    (expected,) = torch.autograd.grad((0.7 * own + 0.3 * chance.mean(-1)).sum(), logits)
    smooth = class_losses(logits, micro_batch.labels, 0.3)
    torch.testing.assert_close(smooth, own)
    torch.testing.assert_close(torch.autograd.grad(smooth.sum(), logits)[0], expected)
    loss = ClassLoss(model, label_smoothing=0.3)
    found = []
    for training in (True, False):
        loss.train(training).zero_grad()
        loss(micro_batch).tokens.sum().backward()
        found.append(model.classifier.weight.grad.clone())
    assert not torch.allclose(*found)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("bert", ["classifier", "bert.pooler"]),
        ("roberta", ["classifier"]),
        ("distilbert", ["pre_classifier", "classifier"]),
        ("electra", ["classifier"]),
        ("llama", ["score"]),
    ],
)
def test_names_of_the_head_modules(folders: dict[str, Path], kind: str, names: list[str]) -> None:
    model = model_of(folders[kind], spec_of({"type": "Full"}))
    assert head_names(model) == names
    assert model.config.id2label == dict(enumerate(CLASSES))


def test_the_head_is_initialised_from_the_seed(folders: dict[str, Path]) -> None:
    def head(seed: int) -> torch.Tensor:
        model = model_of(folders["bert"], spec_of({"type": "Full"}, seed=seed))
        return torch.cat([model.classifier.weight, model.bert.pooler.dense.weight])

    first = head(1)
    torch.rand(3)  # earlier draws must not matter
    assert torch.equal(head(1), first)
    assert not torch.equal(head(2), first)


def test_a_head_for_the_same_classes_is_kept_and_any_other_initialised(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    spec = spec_of({"type": "Full"})
    model = model_of(folders["bert"], spec)
    with torch.no_grad():
        model.classifier.weight.fill_(7.0)
    model.save_pretrained(tmp_path)
    load_tokenizer(folders["bert"]).save_pretrained(tmp_path)

    same = model_of(tmp_path, spec)
    assert (same.classifier.weight == 7.0).all()
    for classes in (["bad", "good", "unknown"], ["bad", "good"]):
        drawn = model_of(tmp_path, spec, classes)
        assert drawn.classifier.weight.shape == (len(classes), SHAPE["hidden_size"])
        assert (drawn.classifier.weight.abs() < 1.0).all()
        assert torch.equal(drawn.bert.pooler.dense.weight, model.bert.pooler.dense.weight)


def test_weights_that_lack_more_than_a_head_are_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    config = AutoConfig.from_pretrained(folders["bert"])
    config.num_hidden_layers = 3
    for path in folders["bert"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"do not hold bert\.encoder\.layer\.2\.") as refused:
        model_of(tmp_path, spec_of({"type": "Full"}))
    assert refused.value.reason == "IncompleteModel"


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("method", [{"type": "Full"}, {"type": "LoRA"}], ids=["Full", "LoRA"])
def test_muon_leaves_the_head_to_adamw(
    folders: dict[str, Path], kind: str, method: dict[str, Any]
) -> None:
    model = model_of(folders[kind], spec_of(method))
    own, rest = split(model, "Muon")
    names = {p: n for n, p in model.named_parameters()}
    heads = {n for p, n in names.items() if p.requires_grad and is_head(kind, n)}
    assert heads
    assert heads <= {names[p] for p in rest}
    assert own


def is_head(kind: str, name: str) -> bool:
    named = {"bert": ("classifier.", "bert.pooler."), "llama": ("score.",)}[kind]
    return any(part in name for part in named) and "original_module" not in name


METHODS_HERE: dict[str, tuple[dict[str, Any], Any]] = {
    "Full": ({"type": "Full"}, lambda name: True),
    "Partial": (
        {"type": "Partial", "partial": {"lastLayers": 1}}, lambda name: "layers.1." in name
        or "layer.1." in name,
    ),
    "LoRA": ({"type": "LoRA", "lora": {"rank": 4}}, lambda name: ".lora_" in name),
    "DoRA": ({"type": "LoRA", "lora": {"rank": 4, "useDora": True}}, lambda n: ".lora_" in n),
    "IA3": ({"type": "IA3"}, lambda name: ".ia3_l." in name),
}  # fmt: skip


def test_every_method_of_the_task_is_tested() -> None:
    kinds = [(n, kind) for n, kind in METHODS.items() if kind.trains]
    allowed = {n for n, kind in kinds if "SequenceClassification" in kind.tasks}
    assert allowed == METHODS_HERE.keys() & METHODS


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("name", METHODS_HERE)
def test_a_method_trains_its_parameters_and_the_head_resumes_and_is_published(
    folders: dict[str, Path], tmp_path: Path, kind: str, name: str
) -> None:
    method, expected = METHODS_HERE[name]
    spec = spec_of(method)

    class Tuning:
        def __init__(self) -> None:
            self.model = model_of(folders[kind], spec)
            self.loss = ClassLoss(self.model).train()
            self.optimizer = torch.optim.AdamW(optimizer_groups(self.model, spec))

        def step(self, number: int) -> float:
            micro_batch = micro_batch_of([0, 1, 2, 3, 4], number)
            self.model.train()
            with layout_context(micro_batch.layout):
                total = self.loss(micro_batch).tokens.sum()
                total.backward()
            for group in self.optimizer.param_groups:
                group["lr"] = 3e-2 * group["rate_factor"]
            self.optimizer.step()
            self.optimizer.zero_grad()
            return float(total.detach())

    tuning = Tuning()
    named = dict(tuning.model.named_parameters())
    trained = {n for n, p in named.items() if p.requires_grad}
    assert trained == {n for n in named if expected(n) or is_head(kind, n)}
    before = {n: p.detach().clone() for n, p in named.items()}
    for number in range(3):
        tuning.step(number)
    assert {n for n, p in named.items() if not torch.equal(p, before[n])} <= trained
    assert all(not torch.equal(named[n], before[n]) for n in trained if is_head(kind, n))

    state = state_of(tuning.model, tuning.optimizer)
    save_state(FileSystemWriter(tmp_path / "checkpoint"), stage(state, None), None)
    resumed = Tuning()
    load_state(FileSystemReader(tmp_path / "checkpoint"), resumed.model, resumed.optimizer, None)
    micro_batch = micro_batch_of([0, 1, 2, 3, 4])
    with torch.no_grad():
        logits = tuning.loss.eval()(micro_batch, with_logits=True).logits
    check_published(folders[kind], tmp_path, spec, logits)
    assert resumed.step(3) == tuning.step(3)


def check_published(folder: Path, to: Path, spec: FineTuneJobSpec, expected: torch.Tensor) -> None:
    """Check that published files give the tuned model's logits in plain transformers and peft."""
    files = BaseFiles(Base(ModelLocation(source="s3://models/base"), ()), folder, None)
    tokenizer, micro_batch = load_tokenizer(folder), micro_batch_of([0, 1, 2, 3, 4])

    def check(model: nn.Module, written: Path) -> None:
        padding = AutoTokenizer.from_pretrained(written).pad_token_id
        ids = micro_batch.input_ids.masked_fill(micro_batch.attention_mask == 0, padding)
        with torch.no_grad():
            found = model.eval()(input_ids=ids, attention_mask=micro_batch.attention_mask).logits
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)

    checkpoint, purpose = FileSystemReader(to / "checkpoint"), purpose_of(spec, CLASSES)
    if "Adapter" in spec.method.kind.formats:
        model = tuned_model(folder, None, checkpoint, spec, CLASSES)
        write_adapter(model, tokenizer, files, spec, [], to / "adapter", CLASSES)
        config = AutoConfig.from_pretrained(to / "adapter" / "config.json")
        assert config.id2label == dict(enumerate(CLASSES))
        base = AutoModelForSequenceClassification.from_pretrained(folder, config=config)
        check(PeftModel.from_pretrained(base, str(to / "adapter")), to / "adapter")
    model = tuned_model(folder, Weights.of_folder(folder), checkpoint, spec, CLASSES)
    write_merged(model, tokenizer, folder, [], to / "merged", purpose)
    merged = AutoModelForSequenceClassification.from_pretrained(to / "merged")
    assert merged.config.label2id == {name: i for i, name in enumerate(CLASSES)}
    check(merged, to / "merged")
    assert not (to / "merged" / "generation_config.json").exists()


def test_an_adapter_with_a_head_is_refused_as_a_base(tmp_path: Path) -> None:
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"modules_to_save": None}))
    check_headless(tmp_path, "s3://out/1-a")
    config.write_text(json.dumps({"modules_to_save": ["score"]}))
    with pytest.raises(UserError, match=r"comes with a head \(score\).*output.format: Both"):
        check_headless(tmp_path, "s3://out/1-a")


@pytest.mark.parametrize("kind", ["roberta", "distilbert", "electra"])
def test_heads_of_several_layers_are_saved_with_the_adapter(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    spec = spec_of({"type": "LoRA", "lora": {"rank": 4}})
    model = model_of(folders[kind], spec)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert not any("classifier" in name and ".lora_" in name for name in trained)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        logits = ClassLoss(model).eval()(micro_batch_of([0, 1, 2, 3, 4]), with_logits=True).logits
    optimizer = torch.optim.AdamW(optimizer_groups(model, spec))
    state = state_of(model, optimizer)
    save_state(FileSystemWriter(tmp_path / "checkpoint"), stage(state, None), None)
    check_published(folders[kind], tmp_path, spec, logits)


def test_the_head_is_counted_once(folders: dict[str, Path]) -> None:
    full = parameter_counts(model_of(folders["bert"], spec_of({"type": "Full"})))
    lora = model_of(folders["bert"], spec_of({"type": "LoRA", "lora": {"rank": 4}}))
    added = sum(p.numel() for n, p in lora.named_parameters() if ".lora_" in n)
    assert parameter_counts(lora).total == full.total + added


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_work_of_a_classifier(folders: dict[str, Path], kind: str) -> None:
    """Layers once per token, the head once per document; encoders attend to the whole square."""
    base = model_of(folders[kind], spec_of({"type": "Full"}))
    work = work_of(base, base)
    layers = base.bert.encoder.layer if kind == "bert" else base.model.layers
    assert work.trained == sum(p.numel() for p in layers.parameters() if p.ndim == 2)
    width, layer_count = SHAPE["hidden_size"], SHAPE["num_hidden_layers"]
    assert work.head == len(CLASSES) * width + (width * width if kind == "bert" else 0)
    assert work.attention == layer_count * width * (2 if kind == "bert" else 1)
    lora = model_of(folders[kind], spec_of({"type": "LoRA", "lora": {"rank": 4}}))
    adapted = work_of(lora, lora.get_base_model())
    assert (adapted.frozen, adapted.head) == (work.trained, work.head)
