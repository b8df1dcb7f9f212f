"""How a model lies on a gang: every method gives the same result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine import CPU, tiny_llama
from gangs import forked, free_port
from sharding_worker import tune

from finetune_api.methods import METHODS
from finetune_trainer.engine.sharding import capacity, decoder_blocks

GB = 10**9


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
