"""Profiles of models without weights, compared with the memory of real tensors."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classifiers import write_decoder, write_encoder
from engine import CPU, leave_world
from fixtures_memory import SAMPLES, spec_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Gemma2Config, GPT2Config, MixtralConfig, PreTrainedConfig

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine.memory.estimate import Placement, estimate
from finetune_trainer.engine.memory.profiling import frozen_dtype, profile_model
from finetune_trainer.engine.model import build_base
from finetune_trainer.engine.optimizers import make_optimizers
from finetune_trainer.engine.packing.feed import MicroBatch, build_packed
from finetune_trainer.engine.packing.layout import layout_context
from finetune_trainer.engine.planning.micro_batch_size import MicroBatchSize
from finetune_trainer.engine.precision import precision_of
from finetune_trainer.engine.sharding import distribute
from finetune_trainer.engine.task_losses import TASKS
from finetune_trainer.engine.tuning.methods import apply_method, checkpoint_activations
from finetune_trainer.engine.world import join
from finetune_trainer.failures import UserError
from finetune_trainer.prepared.dataset import TokenSample

TOKENS = 512


class LiveBytes(TorchDispatchMode):
    """Count the bytes of all live storages, and their peak. FSDP resizes storages without an
    operator, so each operator looks at all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._known.setdefault(storage._cdata, weakref.ref(storage, self._gone(storage._cdata)))

    def count(self) -> None:
        storages = [ref() for ref in self._known.values()]
        self.now = sum(s.nbytes() for s in storages if s is not None)
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int) -> Callable[[Any], None]:
        return lambda _: self._known.pop(key, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        self.count()
        return found


def one_row(tokens: int) -> MicroBatch:
    learned = np.zeros(tokens, np.bool_)
    learned[tokens // 2 :] = True
    ids = np.random.default_rng(0).integers(0, 600, tokens).astype(np.int32)
    return build_packed([TokenSample(ids, learned)], [0], seed=0, step=0, device=CPU)


def steps_of_training(folder: Path, spec: FineTuneJobSpec) -> int:
    """Peak bytes of the second of two real steps of two micro-batches each."""
    world, precision = join(spec), precision_of(spec, cuda=False)
    micro_batch = one_row(TOKENS)
    gc.collect()
    with LiveBytes() as live:
        model = apply_method(build_base(folder, frozen_dtype(spec, precision)), spec)
        if spec.training.gradient_checkpointing == "Always":
            checkpoint_activations(model)
        loss = TASKS[spec.task].loss(model, spec.training, None).train()
        for tensor in (*loss.parameters(), *loss.buffers()):
            live.add(tensor)
        module = distribute(loss, world, "NoShard", precision)
        optimizers = make_optimizers(model, spec)
        for _ in range(2):
            live.count()
            live.peak = live.now
            for _ in range(2):
                with layout_context(micro_batch.layout), world.autocast():
                    losses = module(micro_batch)
                    losses.tokens.sum().backward()
                del losses
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    leave_world()
    return live.peak


@pytest.mark.parametrize("again", ["Never", "Always"])
@pytest.mark.parametrize("precision", ["FP32", "BF16"])
@pytest.mark.parametrize("method", ["Full", "LoRA"])
def test_the_estimate_is_close_to_the_peak_of_a_real_step(
    llama: Path, method: str, precision: str, again: str
) -> None:
    spec = spec_of(
        method={"type": method}, compute={"gpusPerNode": 0},
        training={"precision": precision, "gradientCheckpointing": again},
    )  # fmt: skip
    profile = profile_model(llama, spec, 2048)  # profiled at another length than the step's
    placement = Placement("NoShard", again == "Always")
    parts = estimate(profile, spec, MicroBatchSize(TOKENS, TOKENS // 2), placement)
    expected = sum(n for part, n in parts.items() if part not in ("reserve", "checkpoint"))
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
def test_weight_sizes_match_the_real_model(llama: Path, method: dict[str, Any]) -> None:
    spec = spec_of(method=method, training={"precision": "BF16"})
    weights = profile_model(llama, spec, 64).weights
    precision = precision_of(spec, cuda=True)
    model = apply_method(build_base(llama, frozen_dtype(spec, precision)), spec)
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
        profile_model(llama, spec_of(**full, training=training), 64).weights
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
    profile = profile_model(tmp_path, spec, 128)
    found = profile.activations
    assert found is not None
    assert found.saved >= profile.layers * found.block * 0.9 > 0
    assert found.saved > found.inputs > 0


@pytest.mark.parametrize("write", [write_encoder, write_decoder])
def test_classifiers_are_measured(write: Any, tmp_path: Path) -> None:
    spec = spec_of(task="SequenceClassification", training={"precision": "BF16"})
    profile = profile_model(write(tmp_path), spec, 32)
    assert profile.packing == "Padded" and profile.vocabulary == 0
    assert profile.activations is not None
    assert profile.activations.saved > profile.activations.block > 0
    labelled = replace(SAMPLES, supervised=np.ones_like(SAMPLES.lengths))  # one label per sample
    assert labelled.largest_micro_batch(spec, "Padded") == MicroBatchSize(2048, 32, masked=300)


def test_logits_are_counted_per_chunk(llama: Path) -> None:
    micro_batch = MicroBatchSize(1 << 20, 1 << 19)
    at_once = (512 << 20) // (4 * 600)

    def logits(**training: Any) -> int:
        spec = spec_of(training=training)
        profile = profile_model(llama, spec, 64)
        return estimate(profile, spec, micro_batch, Placement("NoShard", False))["logits"]

    assert logits() == 12 * 600 * at_once
    assert logits(labelSmoothing="0.1") == logits()
    replay = {"train": [{"source": "s3://data/a.jsonl", "replay": True}]}
    spec = spec_of(data=replay, training={"anchor": {"klCoefficient": "1"}})
    anchored = profile_model(llama, spec, 64)
    assert (
        estimate(anchored, spec, micro_batch, Placement("NoShard", False))["logits"]
        == 32 * 600 * 2**19
    )


@pytest.mark.parametrize(
    ("blocks", "reason"),
    [
        ({"method": {"type": "LoRA", "lora": {"targetModules": ["nope"]}}}, "NoTargetModules"),
        ({"training": {"routerAuxLossCoefficient": "0.1"}}, "NoRouter"),
    ],
)
def test_unsuitable_settings_are_found_without_the_weights(
    llama: Path, blocks: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError) as refused:
        profile_model(llama, spec_of(**blocks), 64)
    assert refused.value.reason == reason


def test_unsupported_context_parallelism_is_refused(tmp_path: Path) -> None:
    MODELS[2].save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not support context parallelism"):
        profile_model(tmp_path, spec_of(compute={"gpusPerNode": 2, "contextParallel": 2}), 64)
