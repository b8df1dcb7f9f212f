"""Logits in chunks: the same losses and gradients, if the architecture allows chunks."""

from typing import Any

import pytest
import torch
from engine import CPU, samples, tiny_llama
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    Qwen3Config,
)

from finetune_api.training import Training
from finetune_trainer.engine import chunked_head
from finetune_trainer.engine.chunked_head import ChunkedHead, has_plain_head
from finetune_trainer.engine.loss import TokenLoss
from finetune_trainer.engine.packing.feed import build_packed
from finetune_trainer.engine.packing.layout import layout_context
from finetune_trainer.engine.task_losses import TASKS

SMALL: Any = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip


def adapted() -> Any:
    torch.manual_seed(5)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(tiny_llama(), config)


def losses_and_gradient(model: Any, chunk: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    documents = samples([37, 12, 60, 33])
    micro_batch = build_packed(documents, range(4), seed=0, step=0, device=CPU)
    loss = TokenLoss(model, label_smoothing=0.1)
    if chunk is not None:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        loss._chunks = ChunkedHead(inner, limit=4 * 97 * chunk)
        assert loss._chunks.applies(len(micro_batch.labels))
    with layout_context(micro_batch.layout):
        found = loss(micro_batch).tokens
        found.mean().backward()
    grown = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return found.detach(), torch.cat(grown)


@pytest.mark.parametrize("make", [tiny_llama, adapted], ids=["Full", "LoRA"])
@pytest.mark.parametrize("chunk", [1, 7, 40])
def test_chunked_logits_give_the_same_losses_and_gradients(make: Any, chunk: int) -> None:
    expected, gradient = losses_and_gradient(make(), None)
    found, other = losses_and_gradient(make(), chunk)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert (other - gradient).norm() / gradient.norm() < 1e-6


def test_the_memory_profile_decides_whether_a_head_is_plain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once kernels are fused, the model itself cannot be checked."""

    def asked(_model: Any) -> bool:
        raise AssertionError("the model is checked")

    monkeypatch.setattr(chunked_head, "has_plain_head", asked)
    for plain in (True, False):
        loss = TASKS["CausalLM"].loss(tiny_llama(), Training(), plain)
        assert isinstance(loss, TokenLoss)
        assert loss.plain_head == plain
        assert (loss.logits_at_once() is not None) == plain


def test_few_logits_are_not_chunked() -> None:
    assert not ChunkedHead(tiny_llama()).applies(1000)


@pytest.mark.parametrize(
    ("config", "plain"),
    [
        (Qwen3Config(**SMALL, head_dim=8), True),
        (Gemma2Config(**SMALL, head_dim=8), False),  # caps its logits
        (CohereConfig(**SMALL), False),  # scales its logits
        (GraniteConfig(**SMALL, logits_scaling=3.0), False),
    ],
)
def test_scaled_and_capped_logits_are_detected(config: Any, plain: bool) -> None:
    assert has_plain_head(AutoModelForCausalLM.from_config(config)) == plain
