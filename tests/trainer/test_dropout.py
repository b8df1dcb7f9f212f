"""Dropout keyed by seed, step, sample, position and layer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine import CPU, samples, spec_of, tiny_llama
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    MambaConfig,
    ModernBertConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
)

from finetune_trainer.engine.loss import TokenLoss
from finetune_trainer.engine.memory.profiling import profile_model
from finetune_trainer.engine.packing.dropout import (
    KeyedDropout,
    draw,
    draws,
    keep_mask,
    key_dropouts,
    salt_of,
    token_keys,
)
from finetune_trainer.engine.packing.feed import build_packed
from finetune_trainer.engine.packing.layout import layout_context
from finetune_trainer.engine.tuning.methods import apply_method
from finetune_trainer.failures import UserError


def test_masks_keep_their_share_and_depend_on_every_part_of_the_key():
    base = {"seed": 1, "step": 2, "sample": 3}
    keys = [torch.from_numpy(token_keys(**(base | c), length=400)) for c in
            ({}, {"seed": 2}, {"step": 3}, {"sample": 4})]  # fmt: skip
    masks = [keep_mask(k, 64, 5, 0.3) for k in keys] + [keep_mask(keys[0], 64, 6, 0.3)]
    for mask in masks:
        assert mask.float().mean().item() == pytest.approx(0.7, abs=0.01)
    for other in masks[1:]:
        agreement = (masks[0] == other).float().mean().item()
        assert agreement == pytest.approx(0.58, abs=0.02)  # 0.7² + 0.3²: independent


def test_masks_do_not_repeat_along_tokens_or_features():
    mask = keep_mask(torch.from_numpy(token_keys(1, 1, 1, 500)), 300, 1, 0.5).float()
    centred = mask - mask.mean()
    tokens = (centred[1:] * centred[:-1]).mean().item()
    features = (centred[:, 1:] * centred[:, :-1]).mean().item()
    assert abs(tokens) < 0.005
    assert abs(features) < 0.005


def losses(order: list[int], step: int = 7) -> torch.Tensor:
    documents = samples([30, 8, 19])
    model = tiny_llama()
    key_dropouts(model, 0.2)
    loss = TokenLoss(model).train()
    micro_batch = build_packed(
        [documents[i] for i in order], order, numbers=order, seed=3, step=step, device=CPU
    )
    with torch.no_grad(), layout_context(micro_batch.layout):
        found = loss(micro_batch).tokens
    return torch.stack([found[micro_batch.numbers == i].sum() for i in sorted(order)])


def test_dropout_of_a_sample_does_not_depend_on_its_place():
    torch.testing.assert_close(losses([0, 1, 2]), losses([2, 0, 1]), rtol=1e-5, atol=1e-5)


def test_dropout_changes_with_the_step():
    assert not torch.allclose(losses([0, 1, 2]), losses([0, 1, 2], step=8))


def test_models_without_dropout_get_it_after_their_blocks():
    assert key_dropouts(tiny_llama(), 0.1) == 4  # attention and feed-forward of two layers
    assert key_dropouts(tiny_llama(), 0.0) == 0


def tiny_mamba() -> PreTrainedModel:
    """A model without dropout, attention or feed-forward blocks."""
    config = MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("lora", [None, "0.1"], ids=["Full", "LoRA with a dropout of its own"])
def test_dropout_that_would_drop_nothing_is_refused(lora: str | None) -> None:
    method = (
        {"type": "Full"}
        if lora is None
        else {
            "type": "LoRA",
            "lora": {"dropout": lora, "targetModules": ["in_proj", "x_proj"]},
        }
    )
    with pytest.raises(UserError, match=r"training\.dropout: 0\.2 would drop nothing") as refused:
        apply_method(tiny_mamba(), spec_of(method, dropout="0.2"))
    assert refused.value.reason == "UnsuitableModel"
    tuned = apply_method(tiny_mamba(), spec_of(method))
    keyed = [m for m in tuned.modules() if isinstance(m, KeyedDropout)]
    assert bool(keyed) is (lora is not None)


def test_prepare_finds_dropout_that_would_drop_nothing(tmp_path: Path) -> None:
    tiny_mamba().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="would drop nothing"):
        profile_model(tmp_path, spec_of({"type": "Full"}, dropout="0.2"), 64)


def test_dropout_is_the_same_in_two_and_three_dimensions():
    dropout = KeyedDropout(0.5, layer=1).train()
    micro_batch = build_packed(samples([30, 8]), [0, 1], seed=3, step=7, device=CPU)
    x = torch.ones(1, 38, 64)
    with layout_context(micro_batch.layout):
        dropped = dropout(x)
        assert torch.equal(dropout(x[0]), dropped[0])
        assert torch.equal(dropout(x[0, :7]), x[0, :7]), "tokens of one expert have no keys"
    assert (dropped == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_an_adapter_of_a_shared_expert_drops_its_inputs():
    """Qwen2-MoE passes it [tokens, features], without a batch dimension."""
    config = Qwen2MoeConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, moe_intermediate_size=16,
        shared_expert_intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    lora = {"dropout": "0.5", "targetModules": ["shared_expert.up_proj"]}
    tuned = apply_method(
        AutoModelForCausalLM.from_config(config), spec_of({"type": "LoRA", "lora": lora})
    )
    changed = []
    for module in tuned.modules():
        if isinstance(module, KeyedDropout):
            module.register_forward_hook(
                lambda _, given, out: changed.append(not torch.equal(given[0], out))
            )
    micro_batch = build_packed(samples([30]), [0], seed=3, step=7, device=CPU)
    with torch.no_grad(), layout_context(micro_batch.layout):
        TokenLoss(tuned).train()(micro_batch)
    assert changed == [True]


def test_dropout_follows_the_last_layer_of_a_feed_forward_without_module():
    config = OPTConfig(
        vocab_size=97, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    assert key_dropouts(model, 0.1) == 4
    found = {n.split(".layers.0.")[1] for n, m in model.named_modules()
             if ".layers.0." in n and isinstance(m, KeyedDropout)}  # fmt: skip
    assert found == {"self_attn.output_dropout", "fc2.output_dropout"}


def test_identity_in_place_of_dropout_is_replaced() -> None:
    """ModernBERT has one after its attention."""
    config = ModernBertConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, pad_token_id=0, attention_dropout=0.0,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config)
    key_dropouts(model, 0.1)
    assert all(isinstance(layer.attn.out_drop, KeyedDropout) for layer in model.model.layers)


def test_every_dropout_of_a_model_is_replaced():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.1)))
    assert key_dropouts(model, 0.25) == 2
    found = [m for m in model.modules() if isinstance(m, KeyedDropout)]
    assert [m.probability for m in found] == [0.25, 0.25]
    assert not any(type(m) is nn.Dropout for m in model.modules())


KEYS = [1167386645, 2517116316, 113363207, 3067155773, 1826888571]
DRAWN = [
    [2645277314, 332066249, 3032221240],
    [3266836177, 3481258902, 676502390],
    [3076819573, 1209888023, 2462296195],
    [2263962507, 2411988005, 1621641051],
    [3469077774, 1437325457, 802302145],
]


def test_masks_are_pinned():
    """A run resumed by a newer trainer must draw the same masks."""
    keys = torch.from_numpy(token_keys(seed=42, step=3, sample=7, length=5))
    assert (keys.long() & 0xFFFFFFFF).tolist() == KEYS
    drawn = draw(keys, 3, salt_of(2)).long() + 2**31
    assert drawn.tolist() == DRAWN


def test_the_kernel_drops_the_same_elements():
    """In Triton's interpreter, in a subprocess: Triton reads TRITON_INTERPRET on import."""
    pytest.importorskip("triton")
    said = subprocess.run(
        [sys.executable, Path(__file__).with_name("dropout_worker.py")],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr[-3000:]
    assert said.stdout.strip() == "the same"


@pytest.mark.parametrize(
    ("method", "training", "wanted"),
    [
        ({"type": "Full"}, {}, False),
        ({"type": "Full"}, {"dropout": "0.1"}, True),
        ({"type": "Full"}, {"neftuneAlpha": "5"}, True),
        ({"type": "LoRA"}, {}, False),
        ({"type": "LoRA", "lora": {"dropout": "0.1"}}, {}, True),
    ],
)
def test_keys_are_made_only_for_dropout_or_noise(method, training, wanted):
    assert draws(spec_of(method, **training)) is wanted
    micro_batch = build_packed(samples([30]), [0], seed=0, step=0, device=CPU, keyed=wanted)
    assert (micro_batch.layout.dropout_keys is not None) is wanted


def test_dropout_without_keys_is_an_error():
    micro_batch = build_packed(samples([30]), [0], seed=0, step=0, device=CPU, keyed=False)
    with layout_context(micro_batch.layout), pytest.raises(RuntimeError, match="keyed=True"):
        KeyedDropout(0.1, layer=1).train()(torch.ones(1, 30, 4))
