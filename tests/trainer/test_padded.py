"""Padded micro-batches of language models: losses equal those of each document alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench import write_model
from engine import CPU, samples, spec_of
from hypothesis import given
from hypothesis import strategies as st
from test_probe import APART, LENGTHS, LONG, SMALL, TOGETHER, made, own_losses
from transformers import (
    BloomConfig,
    FalconConfig,
    GPTJConfig,
    GPTNeoXConfig,
    JambaConfig,
    Mamba2Config,
    MptConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
)
from tuning import Tuning

from finetune_trainer.engine.chunked_head import ChunkedHead
from finetune_trainer.engine.loss import TokenLoss, micro_batch_losses
from finetune_trainer.engine.memory import profiling
from finetune_trainer.engine.packing.dropout import draws
from finetune_trainer.engine.packing.feed import TokenMicroBatch, build_packed
from finetune_trainer.engine.packing.layout import layout_context
from finetune_trainer.engine.packing.padded import build_padded_tokens
from finetune_trainer.engine.planning.micro_batch_size import Samples, micro_batch_tokens_of
from finetune_trainer.engine.planning.plan import Plan, pack_padded
from finetune_trainer.engine.task_losses import TASKS

MORE: dict[str, PreTrainedConfig] = {
    "OPT": OPTConfig(
        vocab_size=97, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, max_position_embeddings=128, pad_token_id=0,
    ),
    "BLOOM": BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
    "Falcon, ALiBi": FalconConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True
    ),
    "MPT": MptConfig(vocab_size=97, d_model=32, n_layers=2, n_heads=4, max_seq_len=128),
    "GPT-J": GPTJConfig(vocab_size=97, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
    "GPT-NeoX": GPTNeoXConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4,
    ),
    "Jamba": JambaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1,
        num_experts=1, mamba_d_state=4, mamba_dt_rank=4,
    ),
    "Mamba 2": Mamba2Config(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, state_size=8, num_heads=4, head_dim=16,
        n_groups=1, chunk_size=16,
    ),
}  # fmt: skip
ALONE = {"Llama, dynamic"}
"""Models whose rotary frequencies depend on the longest document of a batch."""


def padded(positions: list[int], **changes: Any) -> TokenMicroBatch:
    documents = samples(LENGTHS)
    options: dict[str, Any] = {"seed": 3, "step": 7, "device": CPU} | changes
    return build_padded_tokens(
        [documents[p] for p in positions], positions, numbers=positions, **options
    )


@pytest.mark.parametrize("name", [*APART, *MORE])
def test_padded_documents_have_the_losses_of_documents_alone(name: str) -> None:
    model = made((APART | MORE)[name])
    packing = TASKS["CausalLM"].packing(model, False)
    assert packing == ("Unpacked" if name in ALONE else "Padded")
    found = micro_batch_losses(TokenLoss(model), padded([0, 1, 2, 3, 4]))
    apart = torch.cat([own_losses(model, document) for document in samples(LENGTHS)])
    if name not in ALONE:
        torch.testing.assert_close(found, apart, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["Llama", "Mamba", "gpt-oss", "OPT"])
def test_micro_batches_without_padding_have_no_mask(name: str) -> None:
    """Causal kernels are faster without a mask."""
    model = made((TOGETHER | APART | MORE)[name])
    document = samples([20])[0]
    micro_batch = build_padded_tokens([document] * 2, [0, 0], seed=0, step=0, device=CPU)
    assert micro_batch.attention_mask is None
    apart = torch.cat([own_losses(model, document)] * 2)
    torch.testing.assert_close(
        micro_batch_losses(TokenLoss(model), micro_batch), apart, rtol=1e-5, atol=1e-5
    )


def test_an_empty_micro_batch_has_a_loss_of_zero() -> None:
    loss = TokenLoss(made(APART["gpt-oss"]))
    micro_batch = build_padded_tokens([], [], seed=0, step=0, device=CPU)
    losses = loss(micro_batch)
    assert losses.tokens.tolist() == [0.0] and losses.tokens.requires_grad


@pytest.mark.parametrize("name", ["gpt-oss", "Mamba"])
def test_dropout_and_gradients_do_not_depend_on_the_micro_batch(name: str) -> None:
    """Equal up to rounding: shapes of the matrix products differ."""
    lora = {"dropout": "0.2", "targetModules": ["q_proj"] if name == "gpt-oss" else ["in_proj"]}
    spec = spec_of({"type": "LoRA", "lora": lora}, neftuneAlpha="5")
    assert draws(spec)
    found = []
    for micro_batches in ([[0, 1, 2, 3, 4]], [[4, 2], [1], [3, 0]], [[0], [1], [2], [3], [4]]):
        model: Any = made(APART[name])
        tuned = profiling.apply_method(model, spec)
        loss = TokenLoss(tuned).train()
        total = torch.zeros(())
        for positions in micro_batches:
            micro_batch = padded(positions)
            with layout_context(micro_batch.layout):
                total = total + loss(micro_batch).tokens.sum()
        total.backward()
        grads = {n: p.grad for n, p in tuned.named_parameters() if p.requires_grad}
        assert any(g is not None and g.abs().max() > 0 for g in grads.values())
        found.append({"loss": total.detach()} | grads)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["PromptTuning", "PrefixTuning"])
@pytest.mark.parametrize("dropout", ["0", "0.2"])
def test_virtual_tokens_precede_each_padded_document(
    tmp_path: Path, name: str, dropout: str
) -> None:
    write_model(tmp_path, attention_bias=True)
    spec = spec_of({"type": name, "prompt": {"virtualTokens": 5}}, dropout=dropout)
    tuning = Tuning(tmp_path, spec)
    tuning.step(0)
    loss = tuning.loss.train()
    together = micro_batch_losses(loss, padded([0, 1, 2, 3, 4]))
    apart = torch.cat([micro_batch_losses(loss, padded([p])) for p in range(5)])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    before = torch.cat([
        micro_batch_losses(loss, build_packed([d], [i], seed=3, step=7, device=CPU))
        for i, d in enumerate(samples(LENGTHS))
    ])  # fmt: skip
    torch.testing.assert_close(together, before, rtol=1e-5, atol=1e-5)


def test_the_head_computes_only_supervised_tokens() -> None:
    model = made(APART["gpt-oss"])
    seen = []
    model.get_output_embeddings().register_forward_hook(
        lambda _, given, out: seen.append(out.shape)
    )
    micro_batch = padded([0, 1, 2, 3, 4])
    losses = TokenLoss(model)(micro_batch, with_logits=True)
    assert seen == [torch.Size([1, len(micro_batch.labels), 97])]
    assert losses.logits is not None and losses.logits.shape == (len(micro_batch.labels), 97)


def test_chunked_logits_give_the_same_losses() -> None:
    model = made(APART["Doge"])
    loss = TokenLoss(model).eval()
    micro_batch = padded([0, 1, 2, 3, 4])
    whole = micro_batch_losses(loss, micro_batch)
    loss._chunks = ChunkedHead(model, limit=4 * 97 * 7)
    assert loss._chunks.applies(len(micro_batch.labels))
    torch.testing.assert_close(micro_batch_losses(loss, micro_batch), whole, rtol=1e-5, atol=1e-5)


def test_longrope_beyond_its_original_length_is_unpacked() -> None:
    model = made(Phi3Config(**SMALL, original_max_position_embeddings=32, rope_parameters=LONG))
    prompt = {"type": "PromptTuning", "prompt": {"virtualTokens": 4}}
    kinds = [profiling.packing_of(model, spec_of(prompt, maxLength=n)) for n in (32, 33)]
    assert kinds == ["Padded", "Unpacked"]


lengths_of = st.lists(st.integers(1, 300), min_size=1, max_size=60)


@given(lengths_of, st.integers(1, 40), st.integers(1, 4), st.integers(0, 3))
def test_padded_micro_batches_include_virtual_tokens(
    lengths: list[int], virtual: int, ranks: int, step: int
) -> None:
    capacity = max(lengths) + virtual + 200
    plan = Plan(
        np.array(lengths), np.ones(len(lengths), np.int64), batch_size=8, seed=0,
        micro_batch_tokens=capacity, ranks=ranks, packing="Padded", virtual_tokens=virtual,
    )  # fmt: skip
    found = plan.step(step)
    assert sorted(
        p
        for micro_batches in found.micro_batches
        for micro_batch in micro_batches
        for p in micro_batch
    ) == sorted(found.samples)
    assert len({len(micro_batches) for micro_batches in found.micro_batches}) == 1
    for micro_batch in (
        micro_batch
        for micro_batches in found.micro_batches
        for micro_batch in micro_batches
        if micro_batch
    ):
        assert len(micro_batch) * (max(lengths[p] for p in micro_batch) + virtual) <= capacity
    assert found.tokens == sum(lengths[p] for p in found.samples)
    bare = Plan(
        np.array(lengths), np.ones(len(lengths), np.int64), batch_size=8, seed=0,
        micro_batch_tokens=capacity, ranks=1, packing="Padded", virtual_tokens=virtual,
    )  # fmt: skip
    assert bare.step(step).samples == found.samples, "the same at any number of ranks"


def test_the_largest_padded_micro_batch_bounds_those_of_a_plan() -> None:
    lengths = np.random.default_rng(0).integers(5, 200, 64)
    supervised = lengths // 3
    spec = spec_of(
        {"type": "PromptTuning", "prompt": {"virtualTokens": 20}}, batchSize=16,
        microBatchTokens=1024,
    )  # fmt: skip
    largest = Samples(lengths, supervised, 256).largest_micro_batch(spec, "Padded")
    plan = Plan(
        lengths, supervised, batch_size=16, seed=0, ranks=1, packing="Padded", virtual_tokens=20,
        micro_batch_tokens=micro_batch_tokens_of(spec, 256, int(lengths.max())),
    )  # fmt: skip
    micro_batches = [
        micro_batch for step in range(4) for micro_batch in plan.step(step).micro_batches[0]
    ]
    assert max(len(micro_batches[i]) for i in range(len(micro_batches))) > 4, "several share one"
    for micro_batch in micro_batches:
        assert len(micro_batch) * (max(lengths[list(micro_batch)]) + 20) <= largest.tokens <= 1024
        assert supervised[list(micro_batch)].sum() <= largest.supervised
    assert len(pack_padded(lengths.tolist(), 1024, 1)[0]) < len(lengths)
