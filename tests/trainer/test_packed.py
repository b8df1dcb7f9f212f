"""Packed sequences: each document is computed as if it were alone."""

import threading

import numpy as np
import pytest
import torch
from engine import CPU, samples, tiny_llama
from torch.nn.functional import cross_entropy

from finetune_trainer.engine.loss import TokenLoss, micro_batch_losses
from finetune_trainer.engine.packing import packed
from finetune_trainer.engine.packing.dropout import key_dropouts
from finetune_trainer.engine.packing.feed import build_packed
from finetune_trainer.engine.packing.layout import layout_context

LENGTHS = [37, 12, 5, 80, 40, 40, 3, 2, 21]


def alone(model, sample) -> torch.Tensor:
    """Return the losses of one document by transformers' own sdpa attention, from all logits."""
    model.set_attn_implementation("sdpa")
    ids = torch.from_numpy(sample.ids.astype(np.int64))
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0]
    model.set_attn_implementation(packed.ATTENTION)
    target = np.flatnonzero(sample.supervised)
    return cross_entropy(logits[target - 1], ids[target], reduction="none")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_attention_heads": 4, "num_key_value_heads": 1},
    ],
)
def test_a_packed_document_has_the_loss_of_the_document_alone(config):
    model = tiny_llama(**config).eval()
    documents = samples(LENGTHS)
    micro_batch = build_packed(documents, range(len(documents)), seed=0, step=0, device=CPU)
    together = micro_batch_losses(TokenLoss(model), micro_batch)
    apart = torch.cat([alone(model, s) for s in documents])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


def test_gradients_of_a_packed_sequence_are_those_of_its_documents():
    documents = samples(LENGTHS)

    def gradients(micro_batches: list[list[int]]) -> torch.Tensor:
        model = tiny_llama()
        loss = TokenLoss(model)
        for positions in micro_batches:
            micro_batch = build_packed(
                [documents[p] for p in positions], positions, seed=0, step=0, device=CPU
            )
            with layout_context(micro_batch.layout):
                loss(micro_batch).tokens.sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    together = gradients([list(range(len(documents)))])
    apart = gradients([[i] for i in range(len(documents))])
    assert (together - apart).norm() / apart.norm() < 1e-6


def test_documents_do_not_see_each_other():
    model = tiny_llama().eval()
    first, second, other = samples([20, 30, 20])
    loss = TokenLoss(model)
    one = micro_batch_losses(
        loss, build_packed([first, second], [0, 1], seed=0, step=0, device=CPU)
    )
    two = micro_batch_losses(
        loss, build_packed([other, second], [2, 1], seed=0, step=0, device=CPU)
    )
    n = int(second.supervised.sum())
    # Not bitwise equal: how threads split a matrix product depends on its size.
    torch.testing.assert_close(one[-n:], two[-n:], rtol=1e-6, atol=0)


def test_an_empty_micro_batch_gives_every_weight_a_zero_gradient():
    model = tiny_llama()
    micro_batch = build_packed([], [], seed=0, step=0, device=CPU)
    with layout_context(micro_batch.layout):
        TokenLoss(model)(micro_batch).tokens.sum().backward()
    assert micro_batch.labels.numel() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_attention_outside_of_layout_context_is_sdpa():
    model = tiny_llama().eval()
    ids = torch.randint(0, 97, (3, 11))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    ours = model(input_ids=ids, attention_mask=mask).logits
    model.set_attn_implementation("sdpa")
    assert torch.equal(ours, model(input_ids=ids, attention_mask=mask).logits)


def test_gradient_checkpointing_works_with_backward_in_another_thread():
    """As on a GPU, where autograd recomputes activations in its own thread."""
    documents = samples(LENGTHS)

    def gradients(checkpointed: bool) -> torch.Tensor:
        model = tiny_llama()
        key_dropouts(model, 0.1)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = TokenLoss(model).train()
        micro_batch = build_packed(documents, range(len(documents)), seed=0, step=0, device=CPU)
        with layout_context(micro_batch.layout):
            total = loss(micro_batch).tokens.sum()
            thread = threading.Thread(target=total.backward)
            thread.start()
            thread.join()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    torch.testing.assert_close(gradients(True), gradients(False), rtol=1e-5, atol=1e-6)
