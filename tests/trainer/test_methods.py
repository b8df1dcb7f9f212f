"""Every tuning method: what it trains, that a resume continues exactly, and that the published
model is the tuned model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bench import write_model
from engine import spec_of, tiny_jamba, tiny_llama
from fixtures_memory import spec_of as spec_with
from transformers import AutoModelForCausalLM, CohereConfig
from tuning import Tuning, check_round, logits

from finetune_api.methods import METHODS, OutputFormat
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine.memory.profiling import profile_model
from finetune_trainer.engine.tuning import methods
from finetune_trainer.engine.tuning.methods import apply_method
from finetune_trainer.failures import UserError


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_model(folder, attention_bias=True)
    return folder


CASES: dict[str, tuple[dict[str, Any], Any]] = {
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


def test_every_method_is_applied_and_tested() -> None:
    assert methods._APPLY.keys() == METHODS.keys()
    tested = {method["type"] for method, _ in CASES.values()} | {"QLoRA"}  # in test_quantized
    assert tested == {name for name, kind in METHODS.items() if kind.trains}


def test_a_method_that_trains_nothing_freezes_the_model() -> None:
    model = tiny_llama()
    assert apply_method(model, spec_with(method={"type": "None"})) is model, "no adapter is added"
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("method", "expected"), CASES.values(), ids=CASES)
def test_a_method_trains_its_parameters_resumes_and_is_published(
    base: Path, tmp_path: Path, method: dict[str, Any], expected: Any
) -> None:
    spec = spec_of(method)
    tuning = Tuning(base, spec)
    trained = tuning.trained()
    assert trained == {n for n, _ in tuning.model.named_parameters() if expected(n)}
    assert trained
    check_round(base, tmp_path, spec, tuning)


def test_errors_of_peft_are_quoted() -> None:
    with pytest.raises(
        UserError, match=r"cannot adapt a LlamaForCausalLM.*not supported"
    ) as caught:
        apply_method(tiny_llama(), spec_of({"type": "LoRA", "lora": {"targetModules": ["norm"]}}))
    assert caught.value.reason == "UnsuitableMethod"


def published_as(spec: FineTuneJobSpec, format: OutputFormat) -> FineTuneJobSpec:
    output = spec.output.model_copy(update={"format": format})
    return spec.model_copy(update={"output": output})


@pytest.mark.parametrize("format", ["Merged", "Both"])
@pytest.mark.parametrize(
    "method",
    [
        {"type": "LoRA", "lora": {"targetModules": ["q_proj", "embed_tokens"]}},
        {"type": "LoRA", "lora": {"targetModules": ["lm_head"]}},
        {"type": "LoRA", "lora": {"targetParameters": ["embed_tokens.weight"]}},
        {"type": "IA3", "ia3": {"targetModules": ["lm_head"]}},
    ],
    ids=["embedding", "head", "embedding as a parameter", "scales of the head"],
)
def test_an_adapter_of_a_tied_weight_cannot_be_merged(
    method: dict[str, Any], format: OutputFormat, tmp_path: Path
) -> None:
    adapter = spec_of(method)
    apply_method(tiny_llama(), adapter)
    whole = published_as(adapter, format)
    apply_method(tiny_llama(tie_word_embeddings=False), whole)
    tiny_llama().config.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"model\.embed_tokens\.weight and lm_head\.weight are one .*: Adapter"
    ) as caught:
        profile_model(tmp_path, whole, 64)
    assert caught.value.reason == "NotMergeable"


def test_adapters_of_other_weights_of_a_tied_model_can_be_merged() -> None:
    apply_method(tiny_llama(), published_as(spec_of({"type": "LoRA"}), "Both"))
    apply_method(tiny_llama(), spec_of({"type": "Full"}))


def test_pissa_supports_linear_layers_only() -> None:
    lora = {"targetModules": ["q_proj", "embed_tokens"], "initialization": "PiSSA"}
    with pytest.raises(
        UserError, match=r"linear layers, and model\.embed_tokens is not one"
    ) as caught:
        apply_method(tiny_llama(), spec_of({"type": "LoRA", "lora": lora}))
    assert caught.value.reason == "UnsuitableMethod"


@pytest.mark.parametrize(
    ("lora", "scale"),
    [
        ({"rank": 16}, 2.0),
        ({"rank": 64}, 2.0),
        ({"rank": 16, "useRslora": True}, 2.0),
        ({"rank": 64, "useRslora": True}, 1.0),
        ({"rank": 64, "useRslora": True, "alpha": 16}, 2.0),
    ],
)
def test_the_scale_of_an_adapter_does_not_grow_with_its_rank(
    lora: dict[str, Any], scale: float
) -> None:
    tuned: Any = apply_method(tiny_llama(), spec_of({"type": "LoRA", "lora": lora}))
    layer = tuned.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling == {"default": scale}


def test_the_last_block_of_a_model_with_blocks_of_two_classes() -> None:
    spec = spec_of({"type": "Partial", "partial": {"lastLayers": 1}})
    model = apply_method(tiny_jamba(), spec)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if ".layers.3." in n}


def test_pissa_starts_as_the_base_with_the_principal_part_in_the_adapter(base: Path) -> None:
    spec = spec_of({"type": "LoRA", "lora": {"rank": 8, "initialization": "PiSSA"}})
    tuning = Tuning(base, spec)
    plain = AutoModelForCausalLM.from_pretrained(base)
    torch.testing.assert_close(logits(tuning.model), logits(plain), atol=1e-6, rtol=1e-6)
    layer = tuning.model.base_model.model.model.layers[0].self_attn.q_proj
    adapter = layer.get_delta_weight("default")
    # The residual is the least that a matrix of that rank can leave (Eckart and Young 1936).
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


def test_ia3_requires_module_names_for_unknown_architectures() -> None:
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
def test_partial_settings_that_match_nothing_are_refused(
    partial: dict[str, Any], named: str
) -> None:
    with pytest.raises(UserError) as caught:
        apply_method(tiny_llama(), spec_of({"type": "Partial", "partial": partial}))
    assert caught.value.reason == "NoSuchParameters"
    assert named in caught.value.message
    if "fits no" in caught.value.message:
        assert "model.layers.*.self_attn.q_proj.weight" in caught.value.message
