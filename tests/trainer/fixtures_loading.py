"""Fixtures of the loading tests: small models of several architectures, and a folder of storage."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    GPT2Config,
    HrmTextConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3_5Config,
)

from finetune_trainer.storage.objects import ObjectInfo, ObjectStore

SMALL = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SMALL, "intermediate_size": 72, "num_key_value_heads": 2}
CONFIGS: dict[str, PreTrainedConfig] = {
    "tied": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "untied": LlamaConfig(**LLAMA, tie_word_embeddings=False),
    # The files have one tensor per expert, the model one tensor for all experts.
    "experts": MixtralConfig(**LLAMA, num_local_experts=5),
    # One of three ranks has an empty shard of the experts.
    "four experts": MixtralConfig(**LLAMA, num_local_experts=4),
    # A persistent buffer, and weights that stay in float32.
    "buffers": DeepseekV3Config(
        **SMALL,
        num_key_value_heads=4,
        intermediate_size=64,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        q_lora_rank=16,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        v_head_dim=8,
        qk_nope_head_dim=8,
    ),
    "in 32 bits": Ernie4_5_MoeConfig(
        **LLAMA,
        moe_intermediate_size=16,
        moe_num_experts=4,
        moe_k=2,
        moe_num_shared_experts=1,
        moe_layer_start_index=0,
    ),
    # One tensor of the files is split by rows.
    "split": HrmTextConfig(
        vocab_size=101,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=72,
        head_dim=8,
    ),
    # A configuration for text and images; the model is the language model.
    "composite": Qwen3_5Config(
        text_config={**LLAMA, "head_dim": 8, "layer_types": ["full_attention"] * 2},
    ),
    # Matrices of shape [inputs, outputs], names without the body's prefix, one tensor for three
    # projections.
    "gpt2": GPT2Config(vocab_size=101, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}


@pytest.fixture(scope="session")
def shared_bucket(store: ObjectStore) -> str:
    """One bucket for all loading tests, because the server takes a while to create one."""
    store.create_bucket("test-loading")
    return "test-loading"


@pytest.fixture
def root(shared_bucket: str) -> str:
    """URI of an empty folder in object storage."""
    return f"s3://{shared_bucket}/{uuid.uuid4().hex[:8]}"


@pytest.fixture
def model_of(tmp_path: Path) -> Callable[[str], Path]:
    """``model_of(name)``: writes the model of a configuration, in several files; its folder."""

    def make(name: str) -> Path:
        folder = tmp_path / name
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(CONFIGS[name])
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.uniform_()
        model.save_pretrained(str(folder), max_shard_size="60KB")
        CONFIGS[name].save_pretrained(str(folder))
        return folder

    return make


def upload_weights(store: ObjectStore, root: str, folder: Path) -> list[ObjectInfo]:
    """Upload the safetensors files of a folder; return the objects."""
    for path in sorted(folder.glob("*.safetensors")):
        store.upload(path, f"{root}/{path.name}")
    return list(store.list(f"{root}/"))


def computed_buffers(model: nn.Module) -> dict[str, Any]:
    """Return the buffers that are not persistent."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in kept}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name], values), name
