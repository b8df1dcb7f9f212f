"""Mixtures of experts: adapters of experts or attention, and the router loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bench import write_model
from engine import CPU, samples, spec_of, tiny_llama, tiny_mixtral
from transformers import AutoModelForCausalLM, Qwen2MoeConfig
from tuning import Tuning, check_round

from finetune_trainer.engine.loss import TokenLoss, micro_batch_losses
from finetune_trainer.engine.model import build_base
from finetune_trainer.engine.packing.feed import build_packed
from finetune_trainer.engine.packing.layout import layout_context
from finetune_trainer.engine.tuning.methods import apply_method
from finetune_trainer.failures import UserError


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with mixtures of four experts, stored in two tensors per layer."""
    folder = tmp_path_factory.mktemp("experts")
    write_model(folder)
    tiny_mixtral(130).save_pretrained(folder)
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


def test_the_router_loss_is_added_in_training_and_not_in_evaluation(experts: Path) -> None:
    spec = spec_of({"type": "Full"})
    model: Any = apply_method(build_base(experts, torch.float32), spec)
    micro_batch = build_packed(samples([18, 9]), [0, 1], seed=0, step=0, device=CPU)
    plain, balanced = TokenLoss(model), TokenLoss(model, 0.5)
    with layout_context(micro_batch.layout), torch.no_grad():
        router = model(
            input_ids=micro_batch.input_ids,
            position_ids=micro_batch.position_ids,
            output_router_logits=True,
        ).aux_loss
        found = balanced.train()(micro_batch)
        assert torch.equal(found.tokens, plain.train()(micro_batch).tokens), "reported separately"
    assert router > 0
    torch.testing.assert_close(found.router, router)
    torch.testing.assert_close(found.added, 0.5 * router * len(found.tokens))
    assert torch.equal(
        micro_batch_losses(balanced.eval(), micro_batch),
        micro_batch_losses(plain.eval(), micro_batch),
    )
    with layout_context(micro_batch.layout):
        balanced.train()(micro_batch).added.backward()
    assert model.model.layers[0].mlp.gate.weight.grad.abs().max() > 0
    with pytest.raises(UserError, match="routerAuxLossCoefficient") as caught:
        TokenLoss(tiny_llama(), 0.5)
    assert caught.value.reason == "NoRouter"


def test_experts_and_shared_experts_get_adapters_only_if_named() -> None:
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
def test_a_target_that_matches_nothing_is_refused(
    experts: Path, lora: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError) as caught:
        Tuning(experts, spec_of({"type": "LoRA", "lora": lora}))
    assert caught.value.reason == reason
    known = "model.layers.*.mlp.experts.gate_up_proj" if reason == "NoSuchParameters" else "q_proj"
    assert known in caught.value.message
