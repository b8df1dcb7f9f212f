"""Specs that are refused for lack of memory, or tried with a warning, in prepare and in workers."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engine import CPU
from fixtures_memory import GIB, SAMPLES, profile_of, spec_of

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine.memory.alternatives import alternatives
from finetune_trainer.engine.memory.estimate import (
    ModelProfile,
    Placement,
    decide,
    estimate,
    placements,
)
from finetune_trainer.engine.memory.fitting import check_min_nodes, fit, memory_estimate
from finetune_trainer.engine.memory.formatting import table
from finetune_trainer.engine.memory.profile_cache import ProfileCache
from finetune_trainer.engine.planning.micro_batch_size import MicroBatchSize, Samples
from finetune_trainer.failures import UserError
from finetune_trainer.train import session
from finetune_trainer.train.worker import beside_estimate


@pytest.mark.parametrize(
    ("blocks", "budget", "named"),
    [
        ({"method": {"type": "Full"}}, 0.95, {"gpusPerNode", "method"}),
        ({"training": {"gradientCheckpointing": "Never"}}, 0.9, {"gradientCheckpointing"}),
        ({"training": {"microBatchTokens": 4096}}, 0.97, {"microBatchTokens"}),
        ({"method": {"type": "Full"}, "compute": {"gpusPerNode": 8, "sharding": "NoShard"}}, 0.95,
         {"sharding"}),
        ({"method": {"type": "Full"}, "training": {"gradientCheckpointing": "Never",
          "microBatchTokens": 4096}}, 0.6, {"gradientCheckpointing", "microBatchTokens"}),
    ],
)  # fmt: skip
def test_doubtful_fit_is_tried_with_a_warning_that_names_fitting_alternatives(
    llama: Path, blocks: dict[str, Any], budget: float, named: set[str], monkeypatch: Any
) -> None:
    # Without the constant part, the differences between specs of a small model matter.
    monkeypatch.setattr("finetune_trainer.engine.memory.estimate._RUNTIME", {"gpu": 0, "cpu": 0})
    spec, measure = spec_of(**blocks), ProfileCache(llama, 512)
    profile = measure(spec)
    micro_batch = SAMPLES.largest_micro_batch(spec, profile.packing)
    least = min(
        sum(estimate(profile, spec, micro_batch, p).values()) for p in placements(profile, spec)
    )
    memory = round(budget * least)
    tried = fit(spec, SAMPLES, memory, measure)
    assert tried.needed == least > memory > tried.certain
    assert "it may not fit. What fits: " in tried.warning
    assert tried.warning in table(tried) and memory_estimate(tried).warning == tried.warning
    found = alternatives(spec, SAMPLES, memory, measure)
    assert 1 <= len(found) <= 3
    for one in found:
        assert str(one) in tried.warning
        fitting = fit(one.spec, SAMPLES, memory, measure)
        assert fitting.needed <= memory and not fitting.warning
    assert any(name in path for one in found for path in one.change for name in named)


@pytest.mark.parametrize(
    ("state", "activations", "budget", "nodes", "outcome"),
    [
        # Sizes in GiB; 8 GPUs per node.
        (40, 10, 80, 1, "fits: NoShard"),
        (40, 10, 40, 1, "fits: FullShard, weights kept gathered"),
        (400, 10, 55, 1, "tried: FullShard, gradient checkpointing"),
        (400, 10, 50, 1, "tried: FullShard, gradient checkpointing"),
        (400, 10, 49, 1, "refused"),
        (400, 10, 49, 2, "fits: FullShard, gradient checkpointing"),
        (80, 0, 10, 1, "tried: FullShard"),
        (80, 0, 9.9, 1, "refused"),
    ],
)
def test_only_certain_parts_lead_to_refusal(
    state: int, activations: int, budget: float, nodes: int, outcome: str
) -> None:
    profile = profile_of(state * GIB, activations * GIB)
    spec = spec_of(method={"type": "Full"}, compute={"gpusPerNode": 8, "nodes": nodes})
    micro_batches = Samples(np.full(4, 1024), np.full(4, 10), 1024)
    try:
        found = fit(spec, micro_batches, round(budget * GIB), lambda other: profile)
    except UserError as error:
        assert error.reason == "DoesNotFit"
        assert re.search(r"alone take [\d.]+ GiB .*: optimizer .*What fits", error.message)
        assert outcome == "refused"
    else:
        said = "tried" if found.warning else "fits"
        assert f"{said}: {found.placement}" == outcome
        assert found.certain == state * GIB // (8 * nodes if "Full" in outcome else 1)


@pytest.mark.parametrize(
    ("nodes", "fewest", "budget", "enough"),
    [(4, 1, 49, 2), (4, 2, 49, None), (8, 1, 12, 5), (4, 1, 51, None), (4, None, 13, None)],
)
def test_min_nodes_on_which_training_cannot_fit_are_refused(
    nodes: int, fewest: int | None, budget: float, enough: int | None
) -> None:
    """400 GiB, shared by the 8 GPUs of each node."""
    profile = profile_of(400 * GIB, GIB)
    compute = {"gpusPerNode": 8, "nodes": nodes, "minNodes": fewest}
    spec = spec_of(method={"type": "Full"}, compute=compute)
    samples, memory = Samples(np.full(4, 1024), np.full(4, 10), 1024), round(budget * GIB)
    if enough is None:
        check_min_nodes(spec, samples, memory, lambda other: profile)
        return
    with pytest.raises(UserError, match=f"Set compute.minNodes: {enough}$") as refused:
        check_min_nodes(spec, samples, memory, lambda other: profile)
    assert refused.value.reason == "DoesNotFit"


@pytest.mark.parametrize(("precision", "named"), [("BF16", True), ("FP8", False)])
def test_qlora_is_not_suggested_with_fp8(precision: str, named: bool) -> None:
    def measure(other: FineTuneJobSpec) -> ModelProfile:
        return profile_of((1 if other.method.kind.quantizes else 900) * GIB)

    training = {"precision": precision, "compile": precision == "FP8"}
    spec = spec_of(method={"type": "Full"}, training=training)
    found = alternatives(spec, SAMPLES, 8 * GIB, measure)
    assert any(one.spec.method.type == "QLoRA" for one in found) == named


def test_a_smaller_model_is_suggested_if_no_alternative_fits(llama: Path) -> None:
    spec, measure = spec_of(), ProfileCache(llama, 512)
    assert "take a smaller model" in fit(spec, SAMPLES, GIB, measure).warning
    with pytest.raises(UserError, match="take a smaller model") as refused:
        fit(spec, SAMPLES, 1 << 10, measure)
    assert refused.value.reason == "DoesNotFit"


def test_nothing_is_refused_if_the_memory_is_unknown(llama: Path) -> None:
    spec, measure = spec_of(), ProfileCache(llama, 512)
    found = fit(spec, SAMPLES, None, measure)
    assert found.placement == Placement("NoShard", False)
    assert "not known before training" in table(found)


def world_of(*memory_bytes: int) -> Any:
    """A world of one node whose ranks have ``memory_bytes`` bytes of memory."""
    return SimpleNamespace(
        device=CPU, nodes=1, processes_per_node=len(memory_bytes), size=len(memory_bytes),
        on_all=lambda work: list(memory_bytes), on_main=lambda make: make(),
    )  # fmt: skip


def test_the_smallest_device_memory_of_the_world_decides(
    llama: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr("finetune_trainer.engine.memory.estimate._RUNTIME", {"gpu": 0, "cpu": 0})
    index = SimpleNamespace(length=SAMPLES.lengths, supervised=SAMPLES.supervised)
    data: Any = SimpleNamespace(
        manifest=SimpleNamespace(max_length=512), index=lambda split: index
    )  # fmt: skip
    spec = spec_of(method={"type": "Full"}, compute={"gpusPerNode": 8, "nodes": 4})
    measure = ProfileCache(llama, 512)
    plenty = session.fitted(spec, data, world_of(8 * GIB, 8 * GIB), measure)
    assert str(plenty.placement) == "NoShard"
    assert "gradients" in capsys.readouterr().out
    less = session.fitted(spec, data, world_of(8 * GIB, plenty.needed - 1), measure)
    assert str(less.placement) == "NoShard, gradient checkpointing"
    capsys.readouterr()
    tried = session.fitted(spec, data, world_of(8 * GIB, less.needed // 3), measure)
    assert "it may not fit. What fits" in capsys.readouterr().out
    with pytest.raises(UserError, match="alone take") as refused:
        session.fitted(spec, data, world_of(8 * GIB, tried.certain - 1), measure)
    assert refused.value.reason == "DoesNotFit"


def test_out_of_memory_failure_includes_the_estimate() -> None:
    found = decide(profile_of(40 * GIB), spec_of(), MicroBatchSize(8, 8), 80 * GIB)
    said = beside_estimate(torch.OutOfMemoryError("no room"), SimpleNamespace(memory=found))  # type: ignore[arg-type]
    assert said.failure_class == "OutOfMemory"
    assert "no room" in said.message and "of 80.0 GiB (NoShard)" in said.message
    warned = dataclasses.replace(found, warning="By the estimate it may not fit.")
    said = beside_estimate(torch.OutOfMemoryError("no room"), SimpleNamespace(memory=warned))  # type: ignore[arg-type]
    assert "no room" in said.message and "it may not fit" in said.message
