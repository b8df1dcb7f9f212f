"""Steps read no tensor values on the host: on a GPU each read would wait for the device.

Checked on the CPU, which runs the same operations. ``test_gpu`` uses torch's own detection of
synchronizations.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from engine import CPU, samples, session_of, spec_of, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MixtralConfig,
    Qwen3Config,
)

from finetune_trainer.engine.packing import packed
from finetune_trainer.engine.packing.feed import Feed, StaticShape, build_packed
from finetune_trainer.engine.planning.plan import Plan
from finetune_trainer.engine.tuning.methods import apply_method
from finetune_trainer.train.step import optimizer_step

LENGTHS = [60, 50, 55, 45, 30, 20, 64, 35]
SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "head_dim": 8,
}  # fmt: skip
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}


def made(config: Any) -> Any:
    packed.install()
    model = AutoModelForCausalLM.from_config(config)
    assert packed.can_pack(model)
    model.set_attn_implementation(packed.ATTENTION)
    return model


MODELS = {
    "Llama": tiny_llama,
    "Mixtral": lambda: made(MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)),
    "Mistral": lambda: made(MistralConfig(**SMALL, sliding_window=16)),
    "Qwen3": lambda: made(Qwen3Config(**SMALL, **WINDOWS, use_sliding_window=True)),
    "Gemma3": lambda: made(Gemma3TextConfig(**SMALL, **WINDOWS)),
}


class HostReads(TorchDispatchMode):
    """Records operations for which the host must read tensor values."""

    READING = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"})

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in self.READING or by_mask:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("architecture", "method", "anchor", "compiled"),
    [
        *((name, "Full", {}, False) for name in MODELS),
        ("Llama", "LoRA", {}, True),
        ("Llama", "Full", {"klCoefficient": "0.5", "l2Coefficient": "5"}, False),
        ("Gemma3", "LoRA", {"klCoefficient": "0.5"}, False),
    ],
)
def test_no_step_reads_from_the_device(
    architecture: str, method: str, anchor: dict[str, str], compiled: bool
) -> None:
    spec = spec_of(
        {"type": method}, precision="FP32", dropout="0.1", anchor=anchor,
        guard={"spikeDeviations": "6"},
    )  # fmt: skip
    model = apply_method(MODELS[architecture](), spec)
    kl = bool(anchor)
    documents = samples(LENGTHS)
    plan = Plan(
        np.array(LENGTHS), np.array([int(s.supervised.sum()) for s in documents]), batch_size=4,
        seed=0, micro_batch_tokens=128, ranks=1, sources=np.arange(len(LENGTHS)) % 2,
    )  # fmt: skip
    base = MODELS[architecture]() if kl and method == "Full" else None
    session = session_of(model, spec, plan, base)
    shape = StaticShape(128, 64) if compiled else None
    with Feed(
        plan, lambda positions: [documents[p] for p in positions], rank=0, start=0, end=2,
        device=CPU, replay=[False, kl], build=partial(build_packed, shape=shape),
    ) as feed:  # fmt: skip
        for batch in feed:
            for micro_batch in batch.micro_batches:
                # Computed outside of the step: the GPU kernel needs no groups.
                _ = (
                    micro_batch.layout.groups,
                    micro_batch.replay and micro_batch.replay.micro_batch.layout.groups,
                )
            with HostReads() as reads:
                optimizer_step(session, batch, 1e-3)
            assert not reads.found
