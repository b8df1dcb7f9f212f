"""The memory estimate of a given profile, and the placement chosen by it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from fixtures_memory import GIB, profile_of, spec_of

from finetune_trainer.engine.memory.estimate import Placement, decide, estimate, placements
from finetune_trainer.engine.memory.formatting import table
from finetune_trainer.engine.planning.micro_batch_size import MicroBatchSize, Samples


@pytest.mark.parametrize(
    ("state", "activations", "nodes", "processes_per_node", "placement"),
    [
        (40, 10, 4, 8, "NoShard"),
        (40, 60, 4, 8, "NoShard, gradient checkpointing"),
        (100, 10, 4, 8, "HybridShard, weights kept gathered"),
        (100, 80, 4, 8, "HybridShard, weights kept gathered, gradient checkpointing"),
        (900, 10, 4, 8, "FullShard"),
        (900, 80, 4, 8, "FullShard, gradient checkpointing"),
        (100, 10, 1, 8, "FullShard, weights kept gathered"),
        (100, 10, 8, 1, "FullShard, weights kept gathered"),
        (40, 60, 1, 1, "NoShard, gradient checkpointing"),
    ],
)
def test_the_cheapest_placement_that_fits_is_chosen(
    state: int, activations: int, nodes: int, processes_per_node: int, placement: str
) -> None:
    spec = spec_of(
        method={"type": "Full"}, compute={"nodes": nodes, "gpusPerNode": processes_per_node}
    )
    profile = profile_of(state * GIB, activations * GIB)
    found = decide(profile, spec, MicroBatchSize(1024, 0), 80 * GIB)
    assert str(found.placement) == placement
    assert found.fits


def test_placements_respect_the_spec() -> None:
    profile = profile_of(GIB)
    training = {"gradientCheckpointing": "Always"}
    spec = spec_of(compute={"gpusPerNode": 8, "sharding": "FullShard"}, training=training)
    assert placements(profile, spec) == [
        Placement("FullShard", True, gathered=True), Placement("FullShard", True)
    ]  # fmt: skip
    whole = dataclasses.replace(profile, recomputes=False)
    assert placements(whole, spec_of()) == [Placement("NoShard", False)]
    several = spec_of(compute={"gpusPerNode": 8}, training={"optimizer": "Adafactor"})
    assert {p.sharding for p in placements(profile, several)} == {"NoShard"}


def test_sharding_divides_state_and_context_parallelism_divides_activations() -> None:
    profile = profile_of(64 * GIB, 32 * GIB)
    micro_batch = MicroBatchSize(1024, 512)
    alone, eight = (spec_of(compute={"gpusPerNode": n}) for n in (1, 8))
    whole = estimate(profile, alone, micro_batch, Placement("NoShard", False))
    parts = estimate(profile, eight, micro_batch, Placement("FullShard", False))
    for part in ("parameters", "gradients", "optimizer"):
        assert parts[part] == whole[part] // 8
    assert parts["activations"] == whole["activations"] == 32 * GIB
    shared = spec_of(compute={"gpusPerNode": 8, "contextParallel": 4})
    assert (
        estimate(profile, shared, micro_batch, Placement("NoShard", False))["activations"]
        == 8 * GIB
    )


def test_the_smallest_placement_is_not_tried_if_its_certain_parts_do_not_fit() -> None:
    """Sharding gathers parameters outside of blocks in full, which can take more than it saves."""
    profile = profile_of(GIB)
    none = {"block": 0, "block_trained": 0, "blocks": 0, "blocks_trained": 0}
    profile = dataclasses.replace(profile, weights=dataclasses.replace(profile.weights, **none))
    spec = spec_of(method={"type": "Full"}, compute={"gpusPerNode": 2})
    micro_batch = MicroBatchSize(8, 8)
    needed = {
        str(p): sum(estimate(profile, spec, micro_batch, p).values())
        for p in placements(profile, spec)
    }
    assert needed["NoShard"] < needed["FullShard"]
    assert str(decide(profile, spec, micro_batch, needed["NoShard"] - 1).placement) == "NoShard"
    assert decide(profile, spec, micro_batch, GIB - 1).placement.sharding == "FullShard"


def test_the_largest_micro_batch_bounds_every_micro_batch() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        lengths = draw.integers(2, 100, 30)
        supervised = np.array([draw.integers(1, n) for n in lengths])
        batch, limit = int(draw.integers(1, 31)), int(draw.integers(100, 400))
        spec = spec_of(training={"batchSize": batch, "microBatchTokens": limit})
        bound = Samples(lengths, supervised, 64).largest_micro_batch(spec, "Concatenated")
        micro_batch = draw.permutation(30)[:batch]
        micro_batch = micro_batch[np.cumsum(lengths[micro_batch]) <= limit]
        assert lengths[micro_batch].sum() <= bound.tokens <= limit
        assert supervised[micro_batch].sum() <= bound.supervised <= bound.tokens


def test_memory_is_reserved_for_activations_that_cannot_be_measured() -> None:
    unknown = dataclasses.replace(profile_of(8 * GIB), activations=None)
    spec = spec_of(compute={"gpusPerNode": 1})
    found = decide(unknown, spec, MicroBatchSize(2048, 100), None)
    assert "activations" not in found.parts and not found.measured
    assert found.parts["reserve"] / found.needed > 0.3
    assert "could not be measured" in table(found)


def test_the_memory_of_a_process_is_read_from_the_manifest() -> None:
    def memory(**compute: Any) -> int | None:
        return spec_of(compute=compute).compute.process_memory

    assert memory() is None
    assert memory(gpuMemory="80Gi") == 80 * GIB
    assert memory(gpuMemory=10**9) == 10**9
    limits = {"limits": {"memory": "1.5G"}}
    assert memory(gpusPerNode=0, processesPerNode=2, resources=limits) == 750_000_000
    assert memory(gpusPerNode=0, resources={"limits": {"memory": "1e9"}}) == 10**9
    assert memory(gpusPerNode=0, resources={"requests": {"memory": "1Gi"}}) is None
    assert memory(gpusPerNode=1, resources=limits) is None


def test_weights_kept_gathered_take_the_size_of_all_blocks() -> None:
    profile = profile_of(64 * GIB, GIB)
    spec = spec_of(method={"type": "Full"}, compute={"gpusPerNode": 8})
    micro_batch = MicroBatchSize(1024, 0)
    kept, again = (
        estimate(profile, spec, micro_batch, Placement("FullShard", False, gathered))["copies"]
        for gathered in (True, False)
    )
    width = 2 if profile.copies else 4
    assert kept - again == width * (profile.weights.blocks - 2 * profile.weights.block)
