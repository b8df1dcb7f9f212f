"""Every tuning method: what it trains, that a resume goes on where it was, and that what is
published is the tuned model."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine import CPU, samples, spec_of, tiny_llama
from peft import PeftModel
from test_training import write_model
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from transformers import AutoModelForCausalLM, CohereConfig, MixtralConfig, Qwen2MoeConfig

from finetune_api.sources import ModelPlace
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine.base import BaseFiles
from finetune_trainer.engine.dcp import load_state, load_weights, save_state, state_of
from finetune_trainer.engine.feed import build_row
from finetune_trainer.engine.layout import row_context
from finetune_trainer.engine.loss import TokenLoss, row_losses
from finetune_trainer.engine.methods import apply_method
from finetune_trainer.engine.model import load_base, load_tokenizer
from finetune_trainer.engine.optimizers import make_optimizers, step_if
from finetune_trainer.engine.parameters import parameter_counts
from finetune_trainer.engine.pissa import initialise
from finetune_trainer.engine.quantized import check_device, check_package
from finetune_trainer.evaluate.measure import Evaluator
from finetune_trainer.failures import UserError
from finetune_trainer.prepare.pipeline import max_length_of
from finetune_trainer.prepared.shards import Reference
from finetune_trainer.publish.weights import tuned_model, write_adapter, write_merged
from finetune_trainer.storage.published import Base
from finetune_trainer.storage.weights import Weights

IDS = torch.arange(1, 25)[None]


class Tuning:
    """A model under tuning, as a training process has it."""

    def __init__(self, folder: Path, spec: FineTuneJobSpec) -> None:
        kind = spec.method.kind
        base = load_base(folder, torch.float32, kind.packs, CPU if kind.quantizes else None)
        self.model: Any = apply_method(base, spec)
        initialise(self.model, spec.method)
        coefficient = float(spec.training.router_aux_loss_coefficient)
        self.loss = TokenLoss(self.model, coefficient).train()
        self.optimizers = make_optimizers(self.model, spec)

    def step(self, number: int) -> float:
        row = build_row(samples([18], seed=number), [0], seed=0, step=number, device=CPU)
        self.model.train()
        with row_context(row.layout):
            losses = self.loss(row)
            (losses.tokens.sum() + losses.added).backward()
        step_if(self.optimizers, 3e-2, torch.tensor(True))
        return float(losses.tokens.detach().sum())

    def trained(self) -> set[str]:
        return {n for n, p in self.model.named_parameters() if p.requires_grad}

    def values(self) -> dict[str, torch.Tensor]:
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        return {name: value.detach().clone() for name, value in named}


def logits(model: Any) -> torch.Tensor:
    """Logits of the real tokens: virtual ones stand before them."""
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found[:, -IDS.shape[1] :]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_model(folder, attention_bias=True)
    return folder


METHODS: dict[str, tuple[dict[str, Any], Any]] = {
    "full": ({"type": "Full"}, lambda name: True),
    "last layer and head": (
        {"type": "Partial", "partial": {"lastLayers": 1, "parameters": ["model.embed_*"]}},
        lambda name: ".layers.1." in name or "embed_tokens" in name,
    ),
    "biases and norms": (
        {"type": "Partial", "partial": {"biases": True, "norms": True}},
        lambda name: name.endswith(".bias") or "norm" in name,
    ),
    "lora": (
        {"type": "LoRA", "lora": {"rank": 4, "dropout": "0.1"}},
        lambda name: ".lora_A." in name or ".lora_B." in name,
    ),
    "rslora, lora+": (
        {"type": "LoRA", "lora": {"rank": 4, "useRslora": True, "loraPlusRatio": "8"}},
        lambda name: ".lora_A." in name or ".lora_B." in name,
    ),
    "dora": (
        {"type": "LoRA", "lora": {"rank": 4, "useDora": True, "dropout": "0.1"}},
        lambda name: ".lora_" in name,
    ),
    "pissa": (
        {"type": "LoRA", "lora": {"rank": 4, "initialization": "PiSSA", "dropout": "0.1"}},
        lambda name: ".lora_" in name and ".default." in name,
    ),
    "pissa, rslora": (
        {"type": "LoRA", "lora": {"rank": 4, "initialization": "PiSSA", "useRslora": True}},
        lambda name: ".lora_" in name and ".default." in name,
    ),
    "ia3": ({"type": "IA3"}, lambda name: ".ia3_l." in name),
    "ia3 of chosen modules": (
        {
            "type": "IA3",
            "ia3": {"targetModules": ["q_proj", "up_proj"], "feedforwardModules": ["up_proj"]},
        },
        lambda name: ".ia3_l." in name and ("q_proj" in name or "up_proj" in name),
    ),
    "prompt tuning": (
        {"type": "PromptTuning", "prompt": {"virtualTokens": 5}},
        lambda name: name.startswith("prompt_encoder."),
    ),
    "prefix tuning": ({"type": "PrefixTuning"}, lambda name: name.startswith("prompt_encoder.")),
}


@pytest.mark.parametrize(("method", "expected"), METHODS.values(), ids=METHODS)
def test_a_method_trains_its_part_resumes_and_is_published(
    base: Path, tmp_path: Path, method: dict[str, Any], expected: Any
) -> None:
    spec = spec_of(method)
    tuning = Tuning(base, spec)
    trained = tuning.trained()
    assert trained == {n for n, _ in tuning.model.named_parameters() if expected(n)}
    assert trained
    check_round(base, tmp_path, spec, tuning)


def check_round(base: Path, tmp_path: Path, spec: FineTuneJobSpec, tuning: Tuning) -> None:
    """Steps change what is trained and no more, a resume goes on where it was, and what is
    published is the tuned model."""
    before = tuning.values()
    for number in range(3):
        tuning.step(number)
    after = tuning.values()
    assert {n for n in after if not torch.equal(before[n], after[n])} == tuning.trained()

    commit = tmp_path / "commit"
    save_state(FileSystemWriter(commit), state_of(tuning.model, tuning.optimizers), None)
    resumed = Tuning(base, spec)
    load_state(FileSystemReader(commit), resumed.model, resumed.optimizers, None)
    assert all(torch.equal(value, after[name]) for name, value in resumed.values().items())
    expected_logits = logits(tuning.model)
    check_published(base, tmp_path, spec, expected_logits)
    assert resumed.step(3) == tuning.step(3)
    ours, theirs = resumed.values(), tuning.values()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def check_published(
    base: Path, folder: Path, spec: FineTuneJobSpec, expected: torch.Tensor
) -> None:
    """What is written of a commit has the tuned model's logits in plain transformers and peft."""
    tokenizer, commit = load_tokenizer(base), FileSystemReader(folder / "commit")
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert (logits(plain) - expected).abs().max() > 1e-3
    if "Adapter" in spec.method.kind.formats:
        model = tuned_model(base, None, commit, spec)
        files = BaseFiles(Base(ModelPlace(source="s3://models/base"), ()), base, None)
        write_adapter(model, tokenizer, files, spec, folder / "adapter")
        adapted = PeftModel.from_pretrained(plain, str(folder / "adapter"))
        torch.testing.assert_close(logits(adapted), expected, atol=2e-6, rtol=1e-5)
    if "Merged" in spec.method.kind.formats:
        model = tuned_model(base, Weights.of_folder(base), commit, spec)
        write_merged(model, tokenizer, base, [128], folder / "merged")
        merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
        torch.testing.assert_close(logits(merged), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_qlora_trains_over_four_bits_and_is_published_on_the_stored_base(
    base: Path, tmp_path: Path, dora: bool
) -> None:
    spec = spec_of({"type": "QLoRA", "lora": {"rank": 4, "useDora": dora}})
    tuning = Tuning(base, spec)
    weights = dict(tuning.model.named_parameters())
    packed_weight = "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"
    assert weights[packed_weight].dtype == torch.uint8
    assert tuning.trained() == {n for n in weights if ".lora_" in n}
    counts = parameter_counts(tuning.model)
    assert counts == parameter_counts(apply_method(load_base(base, torch.float32), spec))

    before = tuning.values()
    for number in range(3):
        tuning.step(number)
    after = tuning.values()
    assert {n for n in after if not torch.equal(before[n], after[n])} == tuning.trained()
    commit = tmp_path / "commit"
    save_state(FileSystemWriter(commit), state_of(tuning.model, tuning.optimizers), None)
    resumed = Tuning(base, spec)
    load_state(FileSystemReader(commit), resumed.model, resumed.optimizers, None)
    assert all(torch.equal(value, after[name]) for name, value in resumed.values().items())

    whole = apply_method(load_base(base, torch.float32), spec)
    load_weights(FileSystemReader(commit), whole)
    with torch.no_grad():  # not by eval(), after which a CPU rearranges the bits for inference
        quantised = tuning.model(input_ids=IDS).logits
    assert (logits(whole) - quantised).abs().max() > 1e-3, "the base was not quantised"
    check_published(base, tmp_path, spec, logits(whole))
    assert resumed.step(3) == tuning.step(3)


@pytest.mark.parametrize(
    ("spec", "instead"),
    [
        (spec_of({"type": "QLoRA"}), r"or method\.type: LoRA"),
        (spec_of({"type": "Full"}, optimizer="AdamW8bit"), r"or training\.optimizer: AdamW$"),
    ],
)
def test_few_bits_need_a_package_and_a_gpu(
    monkeypatch: pytest.MonkeyPatch, spec: FineTuneJobSpec, instead: str
) -> None:
    check_package(spec)
    with pytest.raises(UserError, match=rf"compute\.gpusPerNode, {instead}") as caught:
        check_device(spec, CPU)
    assert caught.value.reason == "GPUMissing"
    monkeypatch.setattr("finetune_trainer.engine.quantized.find_spec", lambda name: None)
    with pytest.raises(UserError, match="EXTRA=gpu") as caught:
        check_package(spec)
    assert caught.value.reason == "PackageMissing"
    check_package(spec_of({"type": "LoRA"}))
    check_device(spec_of({"type": "LoRA"}), CPU)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose feed-forward blocks are mixtures of four experts, held in two tensors."""
    folder = tmp_path_factory.mktemp("experts")
    write_model(folder)
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=130, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize(
    ("lora", "adapters"),
    [
        ({}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ({"targetParameters": EXPERTS}, {"experts"}),
        ({"targetModules": ["q_proj"], "targetParameters": EXPERTS[1:]}, {"q_proj", "experts"}),
    ],
    ids=["attention", "experts", "both"],
)
def test_adapters_of_mixtures_of_experts(
    experts: Path, tmp_path: Path, lora: dict[str, Any], adapters: set[str]
) -> None:
    method = {"type": "LoRA", "lora": {"rank": 4, **lora}}
    spec = spec_of(method, routerAuxLossCoefficient="0.01")
    tuning = Tuning(experts, spec)
    trained = {name.split(".lora_")[0] for name in tuning.trained()}
    assert {part for n in trained for part in n.split(".") if part in adapters} == adapters
    assert all(any(part in name.split(".") for part in adapters) for name in trained)
    check_round(experts, tmp_path, spec, tuning)


def test_the_router_loss_balances_training_and_leaves_measuring_alone(experts: Path) -> None:
    spec = spec_of({"type": "Full"})
    model: Any = apply_method(load_base(experts, torch.float32), spec)
    row = build_row(samples([18, 9]), [0, 1], seed=0, step=0, device=CPU)
    plain, balanced = TokenLoss(model), TokenLoss(model, 0.5)
    with row_context(row.layout), torch.no_grad():
        router = model(
            input_ids=row.input_ids, position_ids=row.position_ids, output_router_logits=True
        ).aux_loss
        found = balanced.train()(row)
        assert torch.equal(found.tokens, plain.train()(row).tokens), "told apart"
    assert router > 0
    torch.testing.assert_close(found.router, router)
    torch.testing.assert_close(found.added, 0.5 * router * len(found.tokens))
    assert torch.equal(row_losses(balanced.eval(), row), row_losses(plain.eval(), row))
    with row_context(row.layout):
        balanced.train()(row).added.backward()
    assert model.model.layers[0].mlp.gate.weight.grad.abs().max() > 0
    with pytest.raises(UserError, match="routerAuxLossCoefficient") as caught:
        TokenLoss(tiny_llama(), 0.5)
    assert caught.value.reason == "NoRouter"


def test_what_peft_refuses_is_told_in_its_words() -> None:
    with pytest.raises(
        UserError, match=r"cannot adapt a LlamaForCausalLM.*not supported"
    ) as caught:
        apply_method(tiny_llama(), spec_of({"type": "LoRA", "lora": {"targetModules": ["norm"]}}))
    assert caught.value.reason == "UnsuitableMethod"


def test_experts_and_those_that_all_tokens_share_get_adapters_by_name_alone() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        Qwen2MoeConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                       moe_intermediate_size=16, shared_expert_intermediate_size=16,
                       num_attention_heads=4, num_key_value_heads=2, num_experts=4)
    )  # fmt: skip
    tuned = apply_method(model, spec_of({"type": "LoRA"}))
    trained = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 4 * 2
    assert all(".self_attn." in name for name in trained)


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ({"targetParameters": ["mlp.experts.down_proj", "experts.up"]}, "NoSuchParameters"),
        ({"targetModules": ["q_proj", "w1"]}, "NoTargetModules"),
        ({"targetModules": ["w1"]}, "NoTargetModules"),
    ],
)
def test_a_target_that_fits_nothing_is_refused(
    experts: Path, lora: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError) as caught:
        Tuning(experts, spec_of({"type": "LoRA", "lora": lora}))
    assert caught.value.reason == reason
    known = "model.layers.*.mlp.experts.gate_up_proj" if reason == "NoSuchParameters" else "q_proj"
    assert known in caught.value.message


def test_pissa_begins_as_the_base_with_the_principal_part_in_the_adapter(base: Path) -> None:
    spec = spec_of({"type": "LoRA", "lora": {"rank": 8, "initialization": "PiSSA"}})
    tuning = Tuning(base, spec)
    plain = AutoModelForCausalLM.from_pretrained(base)
    torch.testing.assert_close(logits(tuning.model), logits(plain), atol=1e-6, rtol=1e-6)
    layer = tuning.model.base_model.model.model.layers[0].self_attn.q_proj
    adapter = layer.get_delta_weight("default")
    # What is left is as small as a matrix of that rank can leave it (Eckart and Young 1936).
    weight = layer.get_base_layer().weight.detach()
    least = torch.linalg.svdvals(weight)[8:].norm()
    torch.testing.assert_close((weight - adapter).norm(), least, rtol=1e-3, atol=0)
    torch.testing.assert_close(layer.get_delta_weight("initial"), -adapter)


def test_groups_of_the_optimizer(base: Path) -> None:
    lora = {"type": "LoRA", "lora": {"loraPlusRatio": "16", "useDora": True}}
    tuning = Tuning(base, spec_of(lora))
    names = {id(p): n for n, p in tuning.model.named_parameters()}
    found = {
        names[id(p)].split(".lora_")[1].split(".")[0]: (group["weight_decay"], group["rate_factor"])
        for group in tuning.optimizers[0].param_groups
        for p in group["params"]
    }
    assert found == {"A": (0.01, 1.0), "B": (0.01, 16.0), "magnitude_vector": (0.0, 1.0)}


@pytest.mark.parametrize("name", ["PromptTuning", "PrefixTuning"])
def test_losses_and_answers_behind_virtual_tokens(base: Path, name: str) -> None:
    """As peft's own forward pass has them, by an attention without kernels."""
    spec = spec_of({"type": name, "prompt": {"virtualTokens": 5}}, dropout="0.2")
    tuning = Tuning(base, spec)
    tuning.step(0)
    model = tuning.model.eval()
    (sample,) = samples([18], seed=9)
    row = build_row([sample], [0], seed=0, step=0, device=CPU)
    found = row_losses(tuning.loss, row)
    prompts = [torch.arange(3, 3 + n).numpy() for n in (4, 9, 4)]
    asked = [Reference(p, "", "", None) for p in prompts]
    answers = evaluator(tuning.loss, base).generate(asked)

    plain = TokenLoss(load_base(base, torch.float32, False)).eval()
    with tuning.loss.untuned():
        assert torch.equal(row_losses(tuning.loss, row), row_losses(plain, row))
        before = evaluator(tuning.loss, base).generate(asked)
        assert before == evaluator(plain, base).generate(asked)
    assert torch.equal(row_losses(tuning.loss, row), found)

    model.set_attn_implementation("eager")
    ids = torch.from_numpy(sample.ids.astype("int64"))
    target = sample.supervised.nonzero()[0]
    with torch.no_grad():
        scores = model(input_ids=ids[None]).logits[0, -len(ids) :].log_softmax(-1)
    torch.testing.assert_close(found, -scores[target - 1, ids[target]], atol=1e-5, rtol=1e-5)
    tokenizer = load_tokenizer(base)
    for prompt, answer in zip(prompts, answers, strict=True):
        said = torch.from_numpy(prompt)
        for _ in range(6):
            with torch.no_grad():
                best = model(input_ids=said[None]).logits[0, -1].argmax()
            said = torch.cat([said, best[None]])
        assert answer == tokenizer.decode(said[len(prompt) :], skip_special_tokens=True)
    assert len(set(answers)) > 1


def evaluator(loss: TokenLoss, base: Path) -> Evaluator:
    gang: Any = SimpleNamespace(
        rank=0, size=1, device=CPU, autocast=nullcontext, together=lambda work: [work()]
    )
    data: Any = SimpleNamespace(manifest=SimpleNamespace(stop_token_ids=[128]))
    return Evaluator(
        gang=gang, data=data, loss=loss, tokenizer=load_tokenizer(base), row_tokens=64,
        packing="Alone", build=build_row, max_samples=8, max_new_tokens=6, virtual_tokens=5,
    )  # fmt: skip


def test_virtual_tokens_take_positions_of_the_model() -> None:
    prompt = {"type": "PromptTuning", "prompt": {"virtualTokens": 20}}
    assert max_length_of(spec_of(prompt), 512) == 492
    assert max_length_of(spec_of(prompt, maxLength=492), 512) == 492
    with pytest.raises(UserError, match=r"493 is more than the 512 positions .*, less 20 of"):
        max_length_of(spec_of(prompt, maxLength=493), 512)
    with pytest.raises(UserError, match="virtualTokens"):
        max_length_of(spec_of(prompt), 20)
    assert max_length_of(spec_of({"type": "LoRA"}, maxLength=512), 512) == 512
    assert max_length_of(spec_of(prompt), None) == 2048


def test_scales_without_known_modules_ask_for_their_names() -> None:
    torch.manual_seed(0)
    unknown = AutoModelForCausalLM.from_config(
        CohereConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                     num_attention_heads=4)
    )  # fmt: skip
    with pytest.raises(UserError) as caught:
        apply_method(unknown, spec_of({"type": "IA3"}))
    assert caught.value.reason == "NoTargetModules"
    assert "spec.method.ia3.targetModules: this model needs names" in caught.value.message
    assert "q_proj" in caught.value.message


@pytest.mark.parametrize(
    ("partial", "named"),
    [
        ({"parameters": ["model.layers.*", "lm_head.*"]}, "parameters: lm_head.*"),
        ({"lastLayers": 3}, "more than the 2 decoder blocks"),
        ({"biases": True, "norms": True}, "partial.biases fits no parameter"),
    ],
)
def test_a_choice_that_fits_nothing_is_refused(partial: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as caught:
        apply_method(tiny_llama(), spec_of({"type": "Partial", "partial": partial}))
    assert caught.value.reason == "NoSuchParameters"
    assert named in caught.value.message
    if "fits no" in caught.value.message:
        assert "model.layers.*.self_attn.q_proj.weight" in caught.value.message
