"""How a model lies on a gang: what is chosen, and that every method gives the same result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine import CPU, tiny_llama
from gangs import forked, free_port
from sharding_worker import tune

from finetune_api.methods import METHODS
from finetune_trainer.engine.sharding import capacity, choose, decoder_blocks, training_state

GB = 10**9


@pytest.mark.parametrize(
    ("state", "nodes", "per_node", "sharding"),
    [
        (50 * GB, 1, 1, "NoShard"),
        (500 * GB, 1, 1, "NoShard"),  # nothing to share with: it fails where it does
        (50 * GB, 4, 8, "NoShard"),
        (60 * GB, 4, 8, "HybridShard"),
        (440 * GB, 4, 8, "HybridShard"),
        (460 * GB, 4, 8, "FullShard"),
        (60 * GB, 1, 8, "FullShard"),
    ],
)
def test_the_least_sharding_that_fits_is_chosen(
    state: int, nodes: int, per_node: int, sharding: str
) -> None:
    assert choose(state, 80 * GB, nodes, per_node) == sharding


def test_training_state_counts_what_is_trained_and_what_is_not() -> None:
    model = tiny_llama()
    size = sum(p.numel() for p in model.parameters())
    assert training_state(model, "AdamW") == 16 * size
    tables = model.model.embed_tokens.weight.numel()
    vectors = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert training_state(model, "Muon") == 12 * size + 4 * (tables + vectors)
    model.requires_grad_(False).to(torch.bfloat16)
    assert training_state(model, "AdamW") == 2 * size


def test_the_memory_of_a_machine_is_shared_by_its_processes() -> None:
    whole = capacity(CPU, 1)
    assert whole > GB
    assert capacity(CPU, 4) == whole // 4


def test_blocks_are_the_decoder_layers() -> None:
    model = tiny_llama(num_hidden_layers=3)
    assert decoder_blocks(model) == list(model.model.layers)


# Everything that the contract allows to be sharded.
SETTINGS: dict[str, dict[str, Any]] = {
    "Full": {},
    "Partial": {"partial": {"lastLayers": 1, "norms": True}},
    "LoRA": {"lora": {"rank": 4}},
    "DoRA": {"lora": {"rank": 4, "useDora": True}},
    "PiSSA": {"lora": {"rank": 4, "initialization": "PiSSA"}},
    "IA3": {},
    "PromptTuning": {"prompt": {"virtualTokens": 4}},
    "PrefixTuning": {"prompt": {"virtualTokens": 4}},
}


def tuned(folder: Path, name: str, size: int, sharding: str) -> tuple[dict[str, Any], Any]:
    folder.mkdir()
    method = {"type": name if name in METHODS else "LoRA", **SETTINGS[name]}
    port = free_port()
    gang = [forked(tune, rank, size, port, method, sharding, str(folder)) for rank in range(size)]
    for process in gang:
        process.join(120)
    assert [p.exitcode for p in gang] == [0] * size
    found: tuple[dict[str, Any], Any] = torch.load(folder / "tuned.pt")
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_a_method_gives_the_same_weights_in_shards(name: str, tmp_path: Path) -> None:
    alone, answer = tuned(tmp_path / "alone", name, 1, "NoShard")
    for sharding in ("NoShard", "FullShard"):
        found, said = tuned(tmp_path / sharding, name, 2, sharding)
        assert found.keys() == alone.keys()
        for key, weight in alone.items():
            assert torch.allclose(found[key], weight, atol=2e-5), (sharding, key)
        assert torch.equal(said, answer), sharding


def test_every_method_that_can_be_sharded_is_tried() -> None:
    assert {name for name, kind in METHODS.items() if kind.shards} == SETTINGS.keys() & METHODS
