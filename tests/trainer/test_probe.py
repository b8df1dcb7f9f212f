"""Which models are packed, decided by the arguments of their attention, and that losses match."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from engine import CPU, samples, spec_of
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    DogeConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    RobertaConfig,
)

from finetune_trainer.engine.loss import TokenLoss, micro_batch_losses
from finetune_trainer.engine.memory import activations, profiling
from finetune_trainer.engine.memory.activations import profiled_attention
from finetune_trainer.engine.packing import packed
from finetune_trainer.engine.packing.feed import build_packed
from finetune_trainer.engine.packing.layout import layout_context
from finetune_trainer.engine.packing.probe import obstacle
from finetune_trainer.engine.task_losses import TASKS
from finetune_trainer.failures import UserError
from finetune_trainer.prepared.dataset import TokenSample

SMALL: Any = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "pad_token_id": 0,
}  # fmt: skip
WINDOW = 16
LENGTHS = [60, 9, 33, 17, 16]
"""Longer than the window, equal to it, and shorter."""
SLIDING: Any = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
EXPERTS: Any = {"num_local_experts": 4, "num_experts_per_tok": 2}
MANY: Any = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}  # fmt: skip

TOGETHER = {
    "Llama": LlamaConfig(**SMALL),
    "GPT-2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "Mistral": MistralConfig(**SMALL, sliding_window=None),
    "Mistral, window": MistralConfig(**SMALL, sliding_window=WINDOW),
    "Mixtral, window": MixtralConfig(**SMALL, **EXPERTS, sliding_window=WINDOW),
    "Phi-3, window": Phi3Config(**SMALL, sliding_window=WINDOW),
    "Qwen2": Qwen2Config(**SMALL),
    "Qwen2, window": Qwen2Config(**SMALL, **SLIDING),
    "Qwen3, window": Qwen3Config(**SMALL, **SLIDING, head_dim=8),
    "Qwen2-MoE": Qwen2MoeConfig(**SMALL, **MANY),
    "PhiMoE": PhimoeConfig(**SMALL, **EXPERTS),
    "Gemma 3": Gemma3TextConfig(
        **SMALL, head_dim=8, sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    ),
}  # fmt: skip
LONG: Any = {
    "rope_type": "longrope", "rope_theta": 10_000.0, "factor": 16.0,
    "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 32,
}  # fmt: skip
APART = {
    "Mamba": MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, state_size=4),
    "LFM2": Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
    "Gemma 2": Gemma2Config(**SMALL, head_dim=8),
    "gpt-oss": GptOssConfig(**SMALL, **EXPERTS, head_dim=8, sliding_window=WINDOW),
    "Qwen2-MoE, window": Qwen2MoeConfig(**SMALL, **MANY, **SLIDING),
    "PhiMoE, window": PhimoeConfig(**SMALL, **EXPERTS, sliding_window=WINDOW),
    "Doge": DogeConfig(**SMALL),
    "Gemma 3, both ways": Gemma3TextConfig(
        **SMALL, head_dim=8, sliding_window=WINDOW, use_bidirectional_attention=True
    ),
    "Llama, dynamic": LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    ),
    "RoBERTa": RobertaConfig(**SMALL, is_decoder=True),
    "Llama, both ways": LlamaConfig(**SMALL, is_causal=False),
}


def made(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    packed.install()
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.config.use_cache = False
    return model.eval()


def packing_of(model: PreTrainedModel) -> str:
    return TASKS["CausalLM"].packing(model, True)


@pytest.mark.parametrize("name", [*TOGETHER, *APART])
def test_a_model_is_packed_where_attend_computes_its_attention(name: str) -> None:
    model = made((TOGETHER | APART)[name])
    apart = "Unpacked" if name == "Llama, dynamic" else "Padded"
    assert packing_of(model) == ("Concatenated" if name in TOGETHER else apart)


def own_losses(model: PreTrainedModel, document: TokenSample) -> torch.Tensor:
    """Return the losses of a document by a plain call of the model."""
    ids = torch.from_numpy(document.ids.astype(np.int64))
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0]
    target = np.flatnonzero(document.supervised)
    return cross_entropy(logits[target - 1], ids[target], reduction="none")


@pytest.mark.parametrize("name", APART)
def test_unpacked_models_have_the_losses_of_a_plain_call(name: str) -> None:
    model = made(APART[name])
    for document in samples(LENGTHS):
        micro_batch = build_packed([document], [0], seed=0, step=0, device=CPU)
        found = micro_batch_losses(TokenLoss(model), micro_batch)
        torch.testing.assert_close(found, own_losses(model, document), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TOGETHER)
def test_packed_models_have_the_losses_of_their_own_attention_and_mask(name: str) -> None:
    model = made(TOGETHER[name])
    documents = samples(LENGTHS)
    model.set_attn_implementation("eager")
    apart = [own_losses(model, document) for document in documents]
    model.set_attn_implementation(packed.ATTENTION)
    micro_batch = build_packed(documents, range(len(documents)), seed=0, step=0, device=CPU)
    together = micro_batch_losses(TokenLoss(model), micro_batch)
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-5, atol=1e-5)


def test_documents_beyond_the_longrope_limit_are_not_packed() -> None:
    """Longrope uses other frequencies above 32 tokens here."""
    model = made(Phi3Config(**SMALL, original_max_position_embeddings=32, rope_parameters=LONG))
    model.set_attn_implementation(packed.ATTENTION)
    kinds = [profiling.packing_of(model, spec_of({"type": "Full"}, maxLength=n)) for n in (32, 33)]
    assert kinds == ["Concatenated", "Unpacked"]
    for lengths in ([32, 9, 20], [60]):
        documents = samples(lengths)
        micro_batch = build_packed(documents, range(len(documents)), seed=0, step=0, device=CPU)
        apart = [own_losses(model, document) for document in documents]
        found = micro_batch_losses(TokenLoss(model), micro_batch)
        torch.testing.assert_close(found, torch.cat(apart), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Doge", "given a custom mask"),
        ("Gemma 2", "given softcap"),
        ("gpt-oss", "given s_aux"),
        ("PhiMoE, window", "window"),
        ("Qwen2-MoE, window", "window"),
        ("Llama, both ways", "given is_causal"),
        ("Gemma 3, both ways", "window"),
        ("Mamba", "1 layers call attention 0 times"),
    ],
)
def test_obstacles_to_packing_are_reported(name: str, said: str) -> None:
    found = obstacle(made(APART[name]))
    assert found is not None and re.search(said, found), found


def test_the_probe_needs_neither_weights_nor_memory() -> None:
    """A model of 70 billion parameters, with a window too long for a materialized mask."""
    config = MistralConfig(
        vocab_size=128_256, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, max_position_embeddings=131_072,
        sliding_window=65_536,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    before = model.config._attn_implementation
    assert packing_of(model) == "Concatenated"
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    "name", [packed.ATTENTION, activations.ATTENTION], ids=["train", "profile"]
)
@pytest.mark.parametrize(
    ("config", "given", "said"),
    [
        (APART["Doge"], {}, "a DogeAttention .* attention_mask"),
        (APART["Gemma 2"], {}, "a Gemma2Attention .* softcap"),
        (TOGETHER["Llama"], {"s_aux": torch.zeros(4)}, "a LlamaAttention .* s_aux"),
        (TOGETHER["Llama"], {"is_causal": False}, "a LlamaAttention .* is_causal"),
    ],
)
def test_unsupported_attention_arguments_are_refused(
    name: str, config: PreTrainedConfig, given: dict[str, Any], said: str
) -> None:
    model: Any = made(config)
    packed.register(activations.ATTENTION, profiled_attention(on_gpu=False))
    model.set_attn_implementation(name)
    micro_batch = build_packed(samples([20, 9]), [0, 1], seed=0, step=0, device=CPU)
    inputs = {
        "input_ids": micro_batch.input_ids,
        "position_ids": micro_batch.position_ids,
        "use_cache": False,
    }
    with layout_context(micro_batch.layout), pytest.raises(UserError, match=said) as caught:
        model(**inputs, **given)
    assert caught.value.reason == "UnsuitableModel"
