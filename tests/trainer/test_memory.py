"""The memory estimate: beside what real tensors take, what is chosen by it, what is refused."""

from __future__ import annotations

import dataclasses
import gc
import re
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from classifiers import write_decoder, write_encoder
from engine import CPU, tiny_llama
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Gemma2Config, GPT2Config, MixtralConfig, PreTrainedConfig

from finetune_api.spec import FineTuneJobSpec, parse_spec
from finetune_trainer.engine.feed import RowTensors, build_row
from finetune_trainer.engine.fitting import alternatives, fit, told
from finetune_trainer.engine.layout import row_context
from finetune_trainer.engine.memory import (
    Activations,
    Facts,
    Placement,
    Weights,
    decide,
    estimate,
    placements,
)
from finetune_trainer.engine.memorywords import table
from finetune_trainer.engine.methods import apply_method, checkpoint_activations
from finetune_trainer.engine.model import load_base
from finetune_trainer.engine.optimizers import make_optimizers
from finetune_trainer.engine.precision import precision_of
from finetune_trainer.engine.rehearsal import frozen_dtype, rehearse
from finetune_trainer.engine.rehearsals import Rehearsals
from finetune_trainer.engine.rowsize import RowSize, Samples
from finetune_trainer.engine.tasks import TASKS
from finetune_trainer.failures import UserError
from finetune_trainer.prepared.shards import TokenSample
from finetune_trainer.train import session
from finetune_trainer.train.worker import beside_estimate

GIB = 1 << 30
TOKENS = 512


def spec_of(**blocks: Any) -> FineTuneJobSpec:
    return parse_spec(
        {
            "model": {"source": "s3://models/base"},
            "data": {"train": [{"source": "s3://data/a.jsonl"}]},
            "output": {"destination": "s3://models/tuned"},
            **blocks,
        }
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama(
        vocab_size=600, hidden_size=64, intermediate_size=192, num_hidden_layers=4
    ).save_pretrained(folder)
    return folder


# --- the estimate beside real tensors ------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return found


def one_row(tokens: int) -> RowTensors:
    learned = np.zeros(tokens, np.bool_)
    learned[tokens // 2 :] = True
    ids = np.random.default_rng(0).integers(0, 600, tokens).astype(np.int32)
    return build_row([TokenSample(ids, learned)], [0], seed=0, step=0, device=CPU)


def steps_of_training(folder: Path, spec: FineTuneJobSpec) -> int:
    """Bytes at the peak of the second of two real steps of two rows each."""
    precision = precision_of(spec.training, cuda=False)
    row = one_row(TOKENS)
    gc.collect()
    with LiveBytes() as live:
        model = apply_method(load_base(folder, frozen_dtype(spec, precision)), spec)
        if spec.training.gradient_checkpointing == "Always":
            checkpoint_activations(model)
        loss = TASKS[spec.task].loss(model, spec.training).train()
        for tensor in (*loss.parameters(), *loss.buffers()):
            live.add(tensor)
        optimizers = make_optimizers(model, spec)
        for _ in range(2):
            live.peak = live.now
            for _ in range(2):
                with row_context(row.layout):
                    halved = torch.autocast("cpu", torch.bfloat16)
                    with halved if precision.autocast else nullcontext():
                        losses = loss(row)
                    losses.tokens.sum().backward()
                del losses
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    return live.peak


@pytest.mark.parametrize("again", ["Never", "Always"])
@pytest.mark.parametrize("precision", ["FP32", "BF16"])
@pytest.mark.parametrize("method", ["Full", "LoRA"])
def test_the_estimate_is_close_above_what_a_step_takes(
    llama: Path, method: str, precision: str, again: str
) -> None:
    spec = spec_of(
        method={"type": method}, compute={"gpusPerNode": 0},
        training={"precision": precision, "gradientCheckpointing": again},
    )  # fmt: skip
    facts = rehearse(llama, spec, 2048)  # of another length than what is run
    placement = Placement("NoShard", again == "Always")
    parts = estimate(facts, spec, RowSize(TOKENS, TOKENS // 2), placement)
    expected = sum(n for part, n in parts.items() if part not in ("reserve", "commit"))
    assert 0.98 < expected / steps_of_training(llama, spec) < 1.25


@pytest.mark.parametrize(
    "method",
    [
        {"type": "Full"},
        {"type": "Partial", "partial": {"lastLayers": 1}},
        {"type": "LoRA", "lora": {"initialization": "PiSSA"}},
        {"type": "IA3"},
        {"type": "PromptTuning"},
        {"type": "PrefixTuning"},
    ],
    ids=lambda method: method["type"],
)
def test_weights_are_counted_as_they_are(llama: Path, method: dict[str, Any]) -> None:
    spec = spec_of(method=method, training={"precision": "BF16"})
    weights = rehearse(llama, spec, 64).weights
    precision = precision_of(spec.training, cuda=True)
    model = apply_method(load_base(llama, frozen_dtype(spec, precision)), spec)
    real = [*model.parameters(), *model.buffers()]
    assert weights.held == sum(t.numel() * t.element_size() for t in real)
    assert weights.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    (optimizer,) = make_optimizers(model, spec)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [t for s in optimizer.state.values() for t in s.values() if t.ndim]
    assert weights.optimizer == sum(t.numel() * t.element_size() for t in moments)


def test_anchors_and_smaller_optimizers_are_counted(llama: Path) -> None:
    full = {"method": {"type": "Full"}, "data": {"train": [
        {"source": "s3://data/a.jsonl"}, {"source": "s3://data/b.jsonl", "replay": True},
    ]}}  # fmt: skip
    plain, held, muon = (
        rehearse(llama, spec_of(**full, training=training), 64).weights
        for training in (
            {}, {"anchor": {"klCoefficient": "1", "l2Coefficient": "1"}}, {"optimizer": "Muon"},
        )
    )  # fmt: skip
    assert (plain.anchors, held.anchors) == (0, (2 + 4) * plain.numbers)
    assert plain.optimizer == 8 * plain.numbers > muon.optimizer > 4 * plain.numbers


MODELS: list[PreTrainedConfig] = [
    GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1),
    MixtralConfig(
        vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    ),
    Gemma2Config(
        vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    ),
]  # fmt: skip


@pytest.mark.parametrize("config", MODELS, ids=lambda config: config.model_type)
def test_any_architecture_is_measured(config: PreTrainedConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    spec = spec_of(method={"type": "LoRA", "lora": {"rank": 4}}, compute={"gpusPerNode": 2})
    facts = rehearse(tmp_path, spec, 128)
    for found in (facts.whole, facts.gathered):
        assert found is not None
        assert found.saved >= facts.layers * found.block * 0.9 > 0
        assert found.saved > found.inputs > 0


@pytest.mark.parametrize("write", [write_encoder, write_decoder])
def test_classifiers_are_measured(write: Any, tmp_path: Path) -> None:
    spec = spec_of(task="SequenceClassification", training={"precision": "BF16"})
    facts = rehearse(write(tmp_path), spec, 32)
    assert facts.packing == "Padded" and facts.vocabulary == 0
    assert facts.whole is not None and facts.whole.saved > facts.whole.block > 0
    assert SAMPLES.largest_row(spec, "Padded") == RowSize(2048, 32)


def test_activations_that_cannot_be_measured_are_left_room() -> None:
    unknown = dataclasses.replace(facts_of(8 * GIB), whole=None, gathered=None)
    spec = spec_of(compute={"gpusPerNode": 1})
    found = decide(unknown, spec, RowSize(2048, 100), None)
    assert "activations" not in found.parts and not found.measured
    assert found.parts["reserve"] / found.needed > 0.3
    assert "could not be measured" in table(found)


# --- what is chosen ------------------------------------------------------------------------------


def facts_of(state: int, activations: int = 0) -> Facts:
    """A model of full tuning whose weights, gradients and optimizer take ``state`` bytes, of 100
    blocks, and whose activations take so many for a row of 1,024 tokens."""
    numbers = state // 16
    per_token = activations / 1024
    kept = Activations(per_token, 0.0, per_token / 100, per_token / 50, 0.0, 0)
    block = numbers // 100
    weights = Weights(
        held=4 * numbers, numbers=numbers, trained=numbers, optimizer=8 * numbers, anchors=0,
        block=block, block_trained=block, blocks=100 * block, blocks_trained=100 * block,
    )  # fmt: skip
    return Facts(
        weights=weights, whole=kept, gathered=kept, layers=100, vocabulary=0, logits_at_once=None,
        packing="Concatenated", recomputes=True, halved=False, copied=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("state", "activations", "nodes", "per_node", "placement"),
    [
        (40, 10, 4, 8, "NoShard"),
        (40, 60, 4, 8, "NoShard, gradient checkpointing"),
        (100, 10, 4, 8, "HybridShard"),
        (100, 80, 4, 8, "HybridShard, gradient checkpointing"),
        (900, 10, 4, 8, "FullShard"),
        (900, 80, 4, 8, "FullShard, gradient checkpointing"),
        (100, 10, 1, 8, "FullShard"),
        (100, 10, 8, 1, "FullShard"),
        (40, 60, 1, 1, "NoShard, gradient checkpointing"),
    ],
)
def test_the_least_costly_placement_that_fits_is_chosen(
    state: int, activations: int, nodes: int, per_node: int, placement: str
) -> None:
    spec = spec_of(method={"type": "Full"}, compute={"nodes": nodes, "gpusPerNode": per_node})
    facts = facts_of(state * GIB, activations * GIB)
    found = decide(facts, spec, RowSize(1024, 0), 80 * GIB)
    assert str(found.placement) == placement
    assert found.fits


def test_what_the_spec_says_is_kept_to() -> None:
    facts = facts_of(GIB)
    training = {"gradientCheckpointing": "Always"}
    spec = spec_of(compute={"gpusPerNode": 8, "sharding": "FullShard"}, training=training)
    assert placements(facts, spec) == [Placement("FullShard", True)]
    whole = dataclasses.replace(facts, recomputes=False)
    assert placements(whole, spec_of()) == [Placement("NoShard", False)]
    several = spec_of(compute={"gpusPerNode": 8}, training={"optimizer": "Adafactor"})
    assert {p.sharding for p in placements(facts, several)} == {"NoShard"}


def test_shards_and_shared_rows_divide_what_they_divide() -> None:
    facts = facts_of(64 * GIB, 32 * GIB)
    row = RowSize(1024, 512)
    alone, eight = (spec_of(compute={"gpusPerNode": n}) for n in (1, 8))
    whole = estimate(facts, alone, row, Placement("NoShard", False))
    parts = estimate(facts, eight, row, Placement("FullShard", False))
    for part in ("parameters", "gradients", "optimizer"):
        assert parts[part] == whole[part] // 8
    assert parts["activations"] == whole["activations"] == 32 * GIB
    shared = spec_of(compute={"gpusPerNode": 8, "contextParallel": 4})
    assert estimate(facts, shared, row, Placement("NoShard", False))["activations"] == 8 * GIB


def test_logits_are_counted_by_the_chunk(llama: Path) -> None:
    row = RowSize(1 << 20, 1 << 19)
    at_once = (512 << 20) // (4 * 600)

    def logits(**training: Any) -> int:
        spec = spec_of(training=training)
        facts = rehearse(llama, spec, 64)
        return estimate(facts, spec, row, Placement("NoShard", False))["logits"]

    assert logits() == 12 * 600 * at_once
    assert logits(labelSmoothing="0.1") == logits()
    replay = {"train": [{"source": "s3://data/a.jsonl", "replay": True}]}
    spec = spec_of(data=replay, training={"anchor": {"klCoefficient": "1"}})
    anchored = rehearse(llama, spec, 64)
    assert estimate(anchored, spec, row, Placement("NoShard", False))["logits"] == 32 * 600 * 2**19


def test_the_largest_row_bounds_every_row() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        lengths = draw.integers(2, 100, 30)
        supervised = np.array([draw.integers(1, n) for n in lengths])
        batch, room = int(draw.integers(1, 31)), int(draw.integers(100, 400))
        spec = spec_of(training={"batchSize": batch, "microBatchTokens": room})
        bound = Samples(lengths, supervised, 64).largest_row(spec, "Concatenated")
        row = draw.permutation(30)[:batch]
        row = row[np.cumsum(lengths[row]) <= room]
        assert lengths[row].sum() <= bound.tokens <= room
        assert supervised[row].sum() <= bound.supervised <= bound.tokens


# --- what is refused, and what is tried with a warning -------------------------------------------

SAMPLES = Samples(np.full(200, 300), np.full(200, 100), 512)


@pytest.mark.parametrize(
    ("blocks", "room", "named"),
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
def test_what_may_not_fit_is_tried_with_a_warning_that_names_what_does(
    llama: Path, blocks: dict[str, Any], room: float, named: set[str], monkeypatch: Any
) -> None:
    # So that what differs between small models counts.
    monkeypatch.setattr("finetune_trainer.engine.memory._RUNTIME", {"gpu": 0, "cpu": 0})
    spec, measure = spec_of(**blocks), Rehearsals(llama, 512)
    facts = measure(spec)
    row = SAMPLES.largest_row(spec, facts.packing)
    least = min(sum(estimate(facts, spec, row, p).values()) for p in placements(facts, spec))
    memory = round(room * least)
    tried = fit(spec, SAMPLES, memory, measure)
    assert tried.needed == least > memory > tried.certain
    assert "it may not fit. What fits: " in tried.warning
    assert tried.warning in table(tried) and told(tried).warning == tried.warning
    found = alternatives(spec, SAMPLES, memory, measure)
    assert 1 <= len(found) <= 3
    for one in found:
        assert str(one) in tried.warning
        fitting = fit(one.spec, SAMPLES, memory, measure)
        assert fitting.needed <= memory and not fitting.warning
    assert any(name in path for one in found for path in one.change for name in named)


@pytest.mark.parametrize(
    ("state", "activations", "room", "nodes", "outcome"),
    [
        # In GiB; on 8 GPUs a node.
        (40, 10, 80, 1, "fits: NoShard"),
        (40, 10, 40, 1, "fits: FullShard"),
        (400, 10, 55, 1, "tried: FullShard, gradient checkpointing"),
        (400, 10, 50, 1, "tried: FullShard, gradient checkpointing"),
        (400, 10, 49, 1, "refused"),
        (400, 10, 49, 2, "fits: FullShard, gradient checkpointing"),
        (80, 0, 10, 1, "tried: FullShard"),
        (80, 0, 9.9, 1, "refused"),
    ],
)
def test_only_what_is_certain_refuses(
    state: int, activations: int, room: float, nodes: int, outcome: str
) -> None:
    facts = facts_of(state * GIB, activations * GIB)
    spec = spec_of(method={"type": "Full"}, compute={"gpusPerNode": 8, "nodes": nodes})
    rows = Samples(np.full(4, 1024), np.full(4, 10), 1024)
    try:
        found = fit(spec, rows, round(room * GIB), lambda other: facts)
    except UserError as error:
        assert error.reason == "DoesNotFit"
        assert re.search(r"alone take [\d.]+ GiB .*: optimizer .*What fits", error.message)
        assert outcome == "refused"
    else:
        said = "tried" if found.warning else "fits"
        assert f"{said}: {found.placement}" == outcome
        assert found.certain == state * GIB // (8 * nodes if "Full" in outcome else 1)


def test_what_takes_least_is_not_tried_where_it_certainly_does_not_fit() -> None:
    """Sharding gathers whole what lies outside of blocks, and can take more than it saves."""
    facts = facts_of(GIB)
    none = {"block": 0, "block_trained": 0, "blocks": 0, "blocks_trained": 0}
    facts = dataclasses.replace(facts, weights=dataclasses.replace(facts.weights, **none))
    spec = spec_of(method={"type": "Full"}, compute={"gpusPerNode": 2})
    row = RowSize(8, 8)
    needed = {str(p): sum(estimate(facts, spec, row, p).values()) for p in placements(facts, spec)}
    assert needed["NoShard"] < needed["FullShard"]
    assert str(decide(facts, spec, row, needed["NoShard"] - 1).placement) == "NoShard"
    assert str(decide(facts, spec, row, GIB - 1).placement) == "FullShard"


@pytest.mark.parametrize(("precision", "named"), [("BF16", True), ("PureBF16", False)])
def test_four_bits_are_not_named_where_weights_are_copied(precision: str, named: bool) -> None:
    def measure(other: FineTuneJobSpec) -> Facts:
        return facts_of((1 if other.method.kind.quantizes else 900) * GIB)

    found = alternatives(spec_of(training={"precision": precision}), SAMPLES, 8 * GIB, measure)
    assert any(one.spec.method.type == "QLoRA" for one in found) == named


def test_what_nothing_makes_fit_is_told_so(llama: Path) -> None:
    spec, measure = spec_of(), Rehearsals(llama, 512)
    assert "take a smaller model" in fit(spec, SAMPLES, GIB, measure).warning
    with pytest.raises(UserError, match="take a smaller model") as refused:
        fit(spec, SAMPLES, 1 << 10, measure)
    assert refused.value.reason == "DoesNotFit"


def test_without_known_memory_nothing_is_refused(llama: Path) -> None:
    spec, measure = spec_of(), Rehearsals(llama, 512)
    found = fit(spec, SAMPLES, None, measure)
    assert found.placement == Placement("NoShard", False)
    assert "not known before training" in table(found)


@pytest.mark.parametrize(
    ("blocks", "reason"),
    [
        ({"method": {"type": "LoRA", "lora": {"targetModules": ["nope"]}}}, "NoTargetModules"),
        ({"training": {"routerAuxLossCoefficient": "0.1"}}, "NoRouter"),
    ],
)
def test_what_does_not_suit_the_model_is_found_without_its_weights(
    llama: Path, blocks: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError) as refused:
        rehearse(llama, spec_of(**blocks), 64)
    assert refused.value.reason == reason


def test_rows_that_cannot_be_shared_are_refused(tmp_path: Path) -> None:
    MODELS[2].save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot be shared"):
        rehearse(tmp_path, spec_of(compute={"gpusPerNode": 2, "contextParallel": 2}), 64)


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


# --- in the gang ---------------------------------------------------------------------------------


def gang_of(*rooms: int) -> Any:
    """A gang of one node whose processes have so much memory."""
    return SimpleNamespace(
        device=CPU, nodes=1, per_node=len(rooms), size=len(rooms),
        together=lambda work: list(rooms), from_first=lambda make: make(),
    )  # fmt: skip


def test_a_gang_goes_by_the_least_memory_of_its_devices(
    llama: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr("finetune_trainer.engine.memory._RUNTIME", {"gpu": 0, "cpu": 0})
    index = SimpleNamespace(length=SAMPLES.lengths, supervised=SAMPLES.supervised)
    data: Any = SimpleNamespace(
        manifest=SimpleNamespace(max_length=512), index=lambda split: index
    )  # fmt: skip
    spec = spec_of(method={"type": "Full"}, compute={"gpusPerNode": 8, "nodes": 4})
    measure = Rehearsals(llama, 512)
    plenty = session.fitted(spec, data, gang_of(8 * GIB, 8 * GIB), measure)
    assert str(plenty.placement) == "NoShard"
    assert "gradients" in capsys.readouterr().out
    less = session.fitted(spec, data, gang_of(8 * GIB, plenty.needed - 1), measure)
    assert str(less.placement) == "NoShard, gradient checkpointing"
    capsys.readouterr()
    tried = session.fitted(spec, data, gang_of(8 * GIB, less.needed // 3), measure)
    assert "it may not fit. What fits" in capsys.readouterr().out
    with pytest.raises(UserError, match="alone take") as refused:
        session.fitted(spec, data, gang_of(8 * GIB, tried.certain - 1), measure)
    assert refused.value.reason == "DoesNotFit"


def test_a_lack_of_memory_is_told_beside_the_estimate() -> None:
    found = decide(facts_of(40 * GIB), spec_of(), RowSize(8, 8), 80 * GIB)
    said = beside_estimate(torch.OutOfMemoryError("no room"), SimpleNamespace(memory=found))  # type: ignore[arg-type]
    assert said.failure_class == "OutOfMemory"
    assert "no room" in said.message and "of 80.0 GiB (NoShard)" in said.message
    warned = dataclasses.replace(found, warning="By the estimate it may not fit.")
    said = beside_estimate(torch.OutOfMemoryError("no room"), SimpleNamespace(memory=warned))  # type: ignore[arg-type]
    assert "no room" in said.message and "it may not fit" in said.message
