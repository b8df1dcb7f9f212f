"""Placement of a model in a world: every method gives the same result with every sharding of the
API; so do gradient checkpointing, BF16 and compiled blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final, get_args

import pytest
import torch
from engine import CPU, tiny_jamba, tiny_llama
from sharding_worker import tune
from worlds import forked

from finetune_api.cluster import Compute
from finetune_api.methods import METHODS
from finetune_trainer.engine.sharding import capacity, decoder_blocks
from ports import free_port
from variants import beyond

pytestmark = pytest.mark.slow

GB = 10**9


def test_the_memory_of_a_machine_is_shared_by_its_processes() -> None:
    whole = capacity(CPU, 1)
    assert whole > GB
    assert capacity(CPU, 4) == whole // 4


def test_blocks_are_the_decoder_layers() -> None:
    model = tiny_llama(num_hidden_layers=3)
    assert decoder_blocks(model) == list(model.model.layers)
    mixed = tiny_jamba()
    assert len({type(block) for block in mixed.model.layers}) == 2
    assert decoder_blocks(mixed) == list(mixed.model.layers)


@dataclass(frozen=True)
class Setting:
    """A setting to train; fields are arguments of ``sharding_worker.tune``."""

    method: dict[str, Any]
    training: dict[str, Any] = field(default_factory=dict)
    checkpointing: bool = False
    experts: bool = False
    apart: bool = False


def lora(**block: Any) -> dict[str, Any]:
    return {"type": "LoRA", "lora": {"rank": 4} | block}


# A method that is added to the API is tested without a change here, with its defaults. A sharding
# that is added fails until it has an entry in SIZES.
_BLOCKS: Final[dict[str, Any]] = {
    "Partial": {"partial": {"lastLayers": 1, "norms": True}},
    "LoRA": {"lora": {"rank": 4}},
    "PromptTuning": {"prompt": {"virtualTokens": 4}},
    "PrefixTuning": {"prompt": {"virtualTokens": 4}},
}
SETTINGS: Final = {
    name: Setting({"type": name} | _BLOCKS.get(name, {}))
    for name, kind in METHODS.items()
    if kind.trains
} | {
    "DoRA": Setting(lora(useDora=True)),
    "PiSSA": Setting(lora(initialization="PiSSA")),
    "Experts": Setting(
        lora(targetParameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]), experts=True
    ),
    # The router loss is per micro-batch, so micro-batches must be the same in all worlds.
    "Router": Setting(
        {"type": "Full"}, {"routerAuxLossCoefficient": "0.5"}, experts=True, apart=True
    ),
}
SHARDINGS: Final = [
    name for name in get_args(Compute.model_fields["sharding"].annotation) if name != "Auto"
]
PAIRS: Final = [
    (name, sharding)
    for name, setting in SETTINGS.items()
    for sharding in SHARDINGS
    if sharding == "NoShard" or METHODS[setting.method["type"]].shards
]
SIZES: Final = {"NoShard": 2, "FullShard": 2, "HybridShard": 4}
EVERYWHERE: Final = [(name, sharding) for name in ("Full", "LoRA") for sharding in SIZES]

Found = tuple[dict[str, torch.Tensor], torch.Tensor]
"""Trained weights, and token ids of an answer."""
Tuned = Callable[[Setting, str, int], Found]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """Return a function that trains a setting in a world of a given sharding and size; results are
    cached."""
    known: dict[str, Found] = {}

    def run(setting: Setting, sharding: str, size: int) -> Found:
        key = f"{setting} {sharding} {size}"
        if key not in known:
            folder, port = tmp_path_factory.mktemp("tuned"), free_port()
            ranks = [
                forked(
                    tune, rank, size, port, setting.method, sharding, str(folder),
                    setting.training, 0, 2, None, setting.checkpointing, setting.experts,
                    setting.apart,
                )
                for rank in range(size)
            ]  # fmt: skip
            for process in ranks:
                process.join(120)
            assert [p.exitcode for p in ranks] == [0] * size
            known[key] = torch.load(folder / "tuned.pt")
        return known[key]

    return run


def assert_alike(found: Found, expected: Found) -> None:
    """Compare weights, except 1 element in 500: where a gradient is nearly zero, Adam's update
    depends on rounding."""
    assert found[0].keys() == expected[0].keys()
    for key, weight in expected[0].items():
        apart = (found[0][key] - weight).abs() > 2e-5
        assert int(apart.sum()) <= apart.numel() // 500, key
    assert torch.equal(found[1], expected[1])


def distance(one: Found, other: Found) -> float:
    """Return the distance relative to the norm of ``other``."""
    both = [torch.cat([w.flatten() for w in found[0].values()]) for found in (one, other)]
    return float((both[0] - both[1]).norm() / both[1].norm())


@pytest.mark.parametrize(
    ("name", "sharding"),
    beyond(PAIRS, lambda name, sharding: sharding != "HybridShard" or name in ("Full", "LoRA")),
)
def test_a_method_gives_the_same_weights_at_any_sharding(
    name: str, sharding: str, tuned: Tuned
) -> None:
    alone = tuned(SETTINGS[name], "NoShard", 1)
    assert_alike(tuned(SETTINGS[name], sharding, SIZES[sharding]), alone)


@pytest.mark.parametrize(
    ("name", "sharding"), beyond(EVERYWHERE, lambda _, sharding: sharding == "FullShard")
)
def test_gradient_checkpointing_changes_nothing(name: str, sharding: str, tuned: Tuned) -> None:
    setting, size = SETTINGS[name], SIZES[sharding]
    kept = tuned(setting, sharding, size)
    again = tuned(replace(setting, checkpointing=True), sharding, size)
    assert again[0].keys() == kept[0].keys()
    assert all(torch.equal(again[0][key], weight) for key, weight in kept[0].items())


@pytest.mark.parametrize(
    ("name", "sharding"), beyond(EVERYWHERE, lambda _, sharding: sharding == "FullShard")
)
def test_bf16_is_the_same_at_any_sharding(name: str, sharding: str, tuned: Tuned) -> None:
    """Each micro-batch is rounded identically, and sums over micro-batches are in float32. With
    bfloat16 copies, a few elements round differently, and Adam turns that into a full step."""
    setting = replace(SETTINGS[name], training={"precision": "BF16"}, apart=True)
    alone = tuned(setting, "NoShard", 1)
    exact = tuned(replace(setting, training={}), "NoShard", 1)
    found = tuned(setting, sharding, SIZES[sharding])
    assert distance(alone, exact) > 1e-4
    if name == "Full":
        assert distance(found, alone) < 0.1 * distance(alone, exact)
    else:
        assert_alike(found, alone)


@pytest.mark.parametrize(("name", "sharding"), [("Full", "FullShard")])
def test_compiled_blocks_give_the_same_weights(name: str, sharding: str, tuned: Tuned) -> None:
    setting = replace(SETTINGS[name], training={"compile": True})
    assert_alike(tuned(setting, sharding, SIZES[sharding]), tuned(SETTINGS[name], "NoShard", 1))
