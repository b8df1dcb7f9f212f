"""Small models and samples for tests of the engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from transformers import (
    AutoModelForCausalLM,
    JambaConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
)

from finetune_api.spec import FineTuneJobSpec, parse_spec
from finetune_trainer.engine.guard import Guard
from finetune_trainer.engine.loss import TokenLoss
from finetune_trainer.engine.optimizers import make_optimizers
from finetune_trainer.engine.packing import packed
from finetune_trainer.engine.planning.plan import Plan
from finetune_trainer.engine.precision import precision_of
from finetune_trainer.engine.sharding import distribute
from finetune_trainer.engine.tuning.anchors import OutputAnchor
from finetune_trainer.engine.world import join
from finetune_trainer.prepared.dataset import TokenSample
from finetune_trainer.train.session import weight_anchor

CPU = torch.device("cpu")


def tiny_llama(seed: int = 0, **changes: object) -> PreTrainedModel:
    """A two-layer Llama with grouped queries, random weights and packed attention."""
    packed.install()
    torch.manual_seed(seed)
    options = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    } | changes  # fmt: skip
    model = AutoModelForCausalLM.from_config(LlamaConfig(**options))
    model.config.use_cache = False
    model.set_attn_implementation(packed.ATTENTION)
    return model


def tiny_mixtral(vocabulary: int = 97) -> PreTrainedModel:
    """A two-layer mixture of four experts with random weights. Expert weights are stacked in two
    tensors."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def tiny_jamba() -> PreTrainedModel:
    """A model of four blocks with random weights. Blocks alternate between two classes."""
    config = JambaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1,
        num_experts=1, mamba_d_state=4, mamba_dt_rank=4,
    )  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def samples(lengths: list[int], seed: int = 0, vocabulary: int = 97) -> list[TokenSample]:
    """Random samples; about a third of the tokens are supervised, always including the last."""
    draw = np.random.default_rng(seed)
    made = []
    for n in lengths:
        supervised = draw.random(n) < 0.3
        supervised[0], supervised[-1] = False, True
        made.append(TokenSample(draw.integers(0, vocabulary, n).astype(np.int32), supervised))
    return made


def session_of(model: Any, spec: FineTuneJobSpec, plan: Plan, base: Any = None) -> Any:
    """A session of a language model for ``optimizer_step``, in a world of one process.

    Args:
        base: a copy of the base model; needed by an output anchor without an adapter.
    """
    world = join(spec)
    kl = float(spec.training.anchor.kl_coefficient)
    loss = TokenLoss(model, anchor_coefficient=kl).train()
    precision = precision_of(spec, world.device.type == "cuda")
    module = distribute(loss, world, "NoShard", precision)
    copy = base and TokenLoss(base.requires_grad_(False).to(world.device)).eval()
    optimizers = make_optimizers(model, spec)
    return SimpleNamespace(
        world=world, plan=plan, spec=spec, module=module, optimizers=optimizers,
        trained=[p for p in model.parameters() if p.requires_grad],
        output_anchor=OutputAnchor(loss, copy) if kl else None,
        weight_anchor=weight_anchor(spec, optimizers),
        guard=Guard(spec.training.guard, world.device),
    )  # fmt: skip


def leave_world() -> None:
    """Undo ``join``: destroy the process group and accelerate's state."""
    if dist.is_initialized():
        dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


def spec_of(method: dict[str, Any], **training: Any) -> FineTuneJobSpec:
    """Minimal spec with a method and training settings; its only training set is replayed."""
    return parse_spec(
        {
            "model": {"source": "s3://models/base"},
            "data": {"train": [{"source": "s3://data/a.jsonl", "replay": True}]},
            "output": {"destination": "s3://models/tuned"},
            "method": method,
            "training": {"weightDecay": "0.01"} | training,
        }
    )
