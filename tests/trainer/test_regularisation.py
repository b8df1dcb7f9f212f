"""Label smoothing, weights of tokens, noise on embeddings (NEFTune), learning rates by layer."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from classifiers import write_encoder
from engine import CPU, samples, spec_of, tiny_jamba, tiny_llama
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForSequenceClassification

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine.chunked_head import ChunkedHead
from finetune_trainer.engine.loss import MicroBatchLosses, TokenLoss
from finetune_trainer.engine.optimizers import check_optimizer
from finetune_trainer.engine.packing.dropout import add_noise
from finetune_trainer.engine.packing.feed import MicroBatch, build_packed
from finetune_trainer.engine.packing.layout import layout_context
from finetune_trainer.engine.parameters import optimizer_groups
from finetune_trainer.engine.tuning.methods import apply_method
from finetune_trainer.failures import UserError


def micro_batch_of(order: list[int], step: int = 7) -> MicroBatch:
    documents = samples([30, 8, 19])
    return build_packed(
        [documents[i] for i in order], order, numbers=order, seed=3, step=step, device=CPU
    )


def losses(loss: TokenLoss, micro_batch: MicroBatch) -> torch.Tensor:
    with torch.no_grad(), layout_context(micro_batch.layout):
        found: MicroBatchLosses = loss(micro_batch)
    return found.tokens


def test_gradients_are_smoothed_only_while_training() -> None:
    """The losses that are shown never are."""
    model, micro_batch = tiny_llama(), micro_batch_of([0, 1])
    measured = losses(TokenLoss(model).eval(), micro_batch)
    loss = TokenLoss(model, label_smoothing=0.2)
    gradients = {}
    for training in (True, False):
        loss.train(training).zero_grad()
        with layout_context(micro_batch.layout):
            found = loss(micro_batch).tokens
        torch.testing.assert_close(found, measured)
        found.sum().backward()
        gradients[training] = gradient_of(model)
    model.zero_grad()
    with layout_context(micro_batch.layout):
        logits = model(
            input_ids=micro_batch.input_ids, position_ids=micro_batch.position_ids
        ).logits[0]
    cross_entropy(
        logits[micro_batch.predict], micro_batch.labels, reduction="sum", label_smoothing=0.2
    ).backward()
    torch.testing.assert_close(gradients[True], gradient_of(model))
    assert not torch.allclose(gradients[True], gradients[False])


def gradient_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_tokens_are_weighted_only_while_training() -> None:
    """In chunks of the head too."""
    micro_batch, gradients = micro_batch_of([0, 1]), []
    for weighting, limit in (("None", 2**30), ("Entropy", 2**30), ("Entropy", 4 * 97 * 5)):
        loss = TokenLoss(tiny_llama(), token_weighting=weighting)
        loss._chunks = ChunkedHead(loss.model, limit=limit)
        for training in (False, True):
            loss.train(training).zero_grad()
            with layout_context(micro_batch.layout):
                found = loss(micro_batch).tokens
            found.mean().backward()
            grown = torch.cat([p.grad.flatten() for p in loss.parameters() if p.grad is not None])
            gradients.append((weighting != "None" and training, found.detach(), grown))
    _, expected, plain = gradients[0]
    for weighted, found, grown in gradients:
        torch.testing.assert_close(found, expected)
        assert torch.allclose(grown, plain, atol=1e-6) is not weighted
    torch.testing.assert_close(gradients[3][2], gradients[5][2], rtol=1e-5, atol=1e-7)


def by_sample(found: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
    return torch.stack([found[micro_batch.numbers == i].sum() for i in range(3)])


def test_noise_of_a_sample_depends_on_the_step_and_not_on_its_place() -> None:
    model = tiny_llama()
    quiet = losses(TokenLoss(model).train(), micro_batch_of([0, 1, 2]))
    add_noise(model.get_input_embeddings(), 5.0)
    loss = TokenLoss(model).train()
    here, there, later = (
        micro_batch_of([0, 1, 2]),
        micro_batch_of([2, 0, 1]),
        micro_batch_of([0, 1, 2], step=8),
    )
    found = losses(loss, here)
    assert not torch.allclose(found, quiet)
    assert not torch.allclose(found, losses(loss, later))
    torch.testing.assert_close(by_sample(found, here), by_sample(losses(loss, there), there))
    assert torch.equal(losses(loss.eval(), here), quiet), "no noise in evaluation"


def test_noise_is_uniform_with_the_bound_of_the_paper() -> None:
    embedding = nn.Embedding(100, 256)
    micro_batch = micro_batch_of([0])
    before = embedding(micro_batch.input_ids)
    add_noise(embedding, 5.0)
    with layout_context(micro_batch.layout):
        noise = (embedding(micro_batch.input_ids) - before)[0]
    bound = 5.0 / math.sqrt(30 * 256)
    assert noise.abs().max() <= bound * 1.001
    assert noise.abs().max() > bound * 0.99
    assert noise.mean().item() == pytest.approx(0, abs=bound * 0.03)
    assert noise.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_neftune_alpha_adds_noise() -> None:
    model = apply_method(tiny_llama(), spec_of({"type": "Full"}, neftuneAlpha="5"))
    quiet = apply_method(tiny_llama(), spec_of({"type": "Full"}))
    micro_batch = micro_batch_of([0])
    assert not torch.allclose(
        losses(TokenLoss(model), micro_batch), losses(TokenLoss(quiet), micro_batch)
    )


def rate_factors(model: nn.Module, spec: FineTuneJobSpec) -> dict[str, float]:
    factors = {
        id(p): group["rate_factor"]
        for group in optimizer_groups(model, spec)
        for p in group["params"]  # type: ignore[attr-defined]
    }
    return {name: factors[id(p)] for name, p in model.named_parameters()}


def test_lower_layers_have_lower_learning_rates() -> None:
    spec = spec_of({"type": "Full"}, layerDecay="0.5")
    model = apply_method(tiny_llama(tie_word_embeddings=False), spec)
    found = rate_factors(model, spec)
    assert {f for name, f in found.items() if ".layers.1." in name} == {0.5}
    assert {f for name, f in found.items() if ".layers.0." in name} == {0.25}
    assert (found["model.embed_tokens.weight"], found["lm_head.weight"]) == (0.125, 1.0)
    assert found["model.norm.weight"] == 1.0


def test_blocks_of_two_classes_count_as_layers() -> None:
    spec = spec_of({"type": "Full"}, layerDecay="0.5")
    found = rate_factors(tiny_jamba(), spec)
    for block in range(4):
        assert {f for n, f in found.items() if f".layers.{block}." in n} == {0.5 ** (4 - block)}


def test_layer_decay_without_blocks_is_refused() -> None:
    spec = spec_of({"type": "Full"}, layerDecay="0.5")
    check_optimizer(tiny_llama(), spec)
    with pytest.raises(UserError, match=r"layerDecay: 0\.5, but no list of blocks") as caught:
        check_optimizer(torch.nn.Linear(2, 2), spec)
    assert caught.value.reason == "UnsuitableModel"


def test_all_embeddings_of_an_encoder_are_below_its_blocks(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(write_encoder(tmp_path), num_labels=2)
    model = AutoModelForSequenceClassification.from_config(config)
    found = rate_factors(model, spec_of({"type": "Full"}, layerDecay="0.5"))
    assert {f for name, f in found.items() if ".embeddings." in name} == {0.125}
    assert {f for name, f in found.items() if ".layer.0." in name} == {0.25}
    assert found["bert.pooler.dense.weight"] == found["classifier.weight"] == 1.0
