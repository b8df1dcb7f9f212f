"""The base model of a run: cached on the node, or read from object storage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from finetune_api.names import ENV_MODEL_CACHE
from finetune_trainer.engine import base as base_module
from finetune_trainer.engine.base import BaseFiles, fetch_base
from finetune_trainer.engine.model import Pretrained, build_base
from finetune_trainer.storage.objects import ObjectInfo, Stores
from finetune_trainer.storage.published import Base

LLAMA = LlamaConfig(
    vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=72,
)  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Folder of a model whose weights are in several files."""
    AutoModelForCausalLM.from_config(LLAMA).save_pretrained(
        str(tmp_path / "local"), max_shard_size="60KB"
    )
    return tmp_path / "local"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, roomy_disk: None) -> Path:
    """Cache folder of a node, on a disk with free space."""
    monkeypatch.setattr(base_module, "_held", [])
    return tmp_path / "cache"


def test_a_cached_base_model_is_read_from_the_node(
    run_spec_for: Any, tmp_path: Path, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_spec = run_spec_for()
    stores = Stores(run_spec)
    for path in model.iterdir():
        stores.default.upload(path, f"{run_spec.base_model.source}/{path.name}")

    plain = fetch_base(run_spec, stores, tmp_path / "plain", weights=True)
    assert plain.cached is None and len(plain.objects) > 1 and not cache.exists()

    monkeypatch.setenv(ENV_MODEL_CACHE, str(cache))
    kept = fetch_base(run_spec, stores, tmp_path / "scratch", weights=True)
    assert kept.cached is not None and kept.cached.parent == cache
    assert kept.objects == plain.objects
    assert not list(kept.folder.glob("*.safetensors"))
    stores.default.delete([info.uri for info in kept.objects])
    found = build_base(kept.folder, torch.float32, Pretrained(kept.weights(stores)))
    expected = dict(AutoModelForCausalLM.from_pretrained(model).named_parameters())
    assert dict(found.named_parameters()).keys() == expected.keys()
    for name, values in found.named_parameters():
        assert torch.equal(values, expected[name]), name


def test_a_node_with_another_version_reads_the_version_of_the_world(tmp_path: Path) -> None:
    def listed(etag: str) -> BaseFiles:
        objects = (ObjectInfo("s3://models/llama/model.safetensors", 1000, etag),)
        return BaseFiles(base, tmp_path, None, objects, tmp_path / etag)

    base: Any = object.__new__(Base)
    first, own, other = listed("one"), listed("one"), listed("two")
    assert own.in_version_of(replace(first, cached=None)) == own
    assert other.in_version_of(first) == replace(first, cached=None)
