"""Floating-point operations of a step, compared with torch's counter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine import CPU, samples, tiny_llama
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from finetune_trainer.engine.flops import PEAKS, work_of
from finetune_trainer.engine.loss import TokenLoss
from finetune_trainer.engine.model import Pretrained, build_base
from finetune_trainer.engine.packing.feed import build_packed
from finetune_trainer.engine.packing.layout import layout_context


def counted(model: Any, length: int) -> tuple[float, int]:
    """Operations of one document's forward and backward pass, by torch's counter."""
    micro_batch = build_packed(samples([length]), [0], seed=0, step=0, device=CPU)
    loss = TokenLoss(model)
    with FlopCounterMode(display=False) as counter, layout_context(micro_batch.layout):
        loss(micro_batch).tokens.sum().backward()
    return counter.get_total_flops(), micro_batch.labels.numel()


@pytest.mark.parametrize("method", ["Full", "LoRA"])
def test_work_equals_the_count_of_torch(method: str) -> None:
    base = tiny_llama(hidden_size=64, num_hidden_layers=4, tie_word_embeddings=False)
    model: Any = base
    if method == "LoRA":
        model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    length = 48
    torch_count, supervised = counted(model, length)
    work = work_of(model, base)
    ours = work.training(np.array([length]), supervised)
    # Torch counts the whole square of the attention, and the recomputation of its scores in the
    # backward pass: seven products instead of three. LoRA: over a frozen base, the inputs of the
    # lowest layer need no gradient, hence the tolerance.
    attention = 2 * work.attention * length**2
    ours += (7 - 3) * attention
    assert torch_count == pytest.approx(ours, rel=1e-9 if method == "Full" else 0.08)


def test_attention_is_counted_within_documents() -> None:
    work = work_of(*[tiny_llama()] * 2)
    apart = work.training(np.array([50, 50]), 10)
    whole = work.training(np.array([100]), 10)
    assert whole - apart == 3 * 2 * work.attention * (100**2 - 2 * 50**2)


def test_device_names_that_contain_others_come_first() -> None:
    names = list(PEAKS)
    assert not any(early in late for i, early in enumerate(names) for late in names[i + 1 :])


def test_experts_count_by_their_share_of_the_tokens() -> None:
    from transformers import AutoModelForCausalLM, MixtralConfig

    def work(experts: int) -> float:
        config = MixtralConfig(
            vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=experts,
            num_experts_per_tok=2,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
        return work_of(model, model).trained

    routers = 2 * 32 * (8 - 4)
    assert work(8) - work(4) == routers


def test_4_bit_weights_count_by_elements(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    plain = build_base(tmp_path, torch.float32)
    packed = build_base(tmp_path, torch.float32, Pretrained(quantize=True))
    weight = packed.model.layers[0].self_attn.q_proj.weight
    assert weight.numel() * 2 == 32 * 32, "two elements per byte"
    plain.requires_grad_(False)
    packed.requires_grad_(False)
    assert work_of(packed, packed) == work_of(plain, plain)


def test_a_cpu_has_no_peak() -> None:
    from finetune_trainer.engine.flops import peak

    assert peak(torch.device("cpu")) is None
