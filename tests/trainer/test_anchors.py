"""Anchors against forgetting: their formulas, computed by hand, and their effect on training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engine import CPU, samples, session_of, spec_of, tiny_llama

from finetune_trainer.engine.loss import MicroBatchLosses, TokenLoss, divergence
from finetune_trainer.engine.optimizers import make_optimizers, step_if
from finetune_trainer.engine.packing.feed import Feed, StepTensors
from finetune_trainer.engine.packing.layout import layout_context
from finetune_trainer.engine.planning.plan import Plan
from finetune_trainer.engine.tuning.anchors import OutputAnchor, WeightAnchor, anchor_bytes
from finetune_trainer.engine.tuning.derived import derive
from finetune_trainer.engine.tuning.methods import apply_method
from finetune_trainer.train.step import optimizer_step

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = [30, 24, 41, 18, 33, 27, 22, 36]
DOCUMENTS = samples(LENGTHS)
SOURCES = [0, 1, 0, 1, 1, 0, 0, 1]
FULL = {"type": "Full"}


def feed_of(
    steps: int, micro_batch_tokens: int = 90, packed: bool = True, replay: bool = True,
    device: torch.device = CPU,
) -> Feed:  # fmt: skip
    """Feed of every document in every step; documents of source 1 are replayed."""
    supervised = np.array([int(s.supervised.sum()) for s in DOCUMENTS])
    plan = Plan(
        np.array(LENGTHS), supervised, batch_size=8, seed=0, micro_batch_tokens=micro_batch_tokens,
        ranks=1, sources=np.array(SOURCES), packing="Concatenated" if packed else "Unpacked",
    )  # fmt: skip
    read = lambda positions: [DOCUMENTS[p] for p in positions]  # noqa: E731
    return Feed(plan, read, rank=0, start=0, end=steps, device=device, replay=[False, replay])


def batch_of(**options: Any) -> StepTensors:
    with feed_of(1, **options) as feed:
        (batch,) = feed
    return batch


def logits_alone(model: Any, document: int) -> torch.Tensor:
    """Return a model's logits at the supervised tokens of one document, without packing."""
    sample = DOCUMENTS[document]
    ids = torch.from_numpy(sample.ids.astype(np.int64))
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids[None]).logits[0]
    return found[torch.from_numpy(sample.supervised).nonzero()[:, 0] - 1]


def test_divergence_by_hand() -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.1, 0.5, 0.4])
    by_hand = sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True))
    # Logits are log-probabilities up to a constant.
    found = divergence((p.log() + 3)[None], (q.log() - 1)[None])
    assert found.tolist() == pytest.approx([by_hand])
    assert divergence(p.log()[None], p.log()[None]).item() == pytest.approx(0, abs=1e-7)


def test_a_micro_batch_holds_its_replay_documents_separately() -> None:
    batch = batch_of()
    assert len(batch.micro_batches) > 1
    for micro_batch, positions in zip(
        batch.micro_batches, batch.plan.micro_batches[0], strict=True
    ):
        replayed = [p for p in positions if SOURCES[p] == 1]
        assert micro_batch.replay is not None
        ids = np.concatenate([DOCUMENTS[p].ids for p in replayed] or [[0]])
        assert micro_batch.replay.micro_batch.input_ids[0].tolist() == ids.tolist()
        assert torch.equal(
            micro_batch.labels[micro_batch.replay.at], micro_batch.replay.micro_batch.labels
        )
        numbers = micro_batch.numbers[micro_batch.replay.at].tolist()
        assert {SOURCES[batch.plan.samples[number]] for number in numbers} <= {1}
    assert all(micro_batch.replay is None for micro_batch in batch_of(replay=False).micro_batches)


def test_replayed_tokens_are_known_without_reading_the_device() -> None:
    """Tensors on the meta device have no data, so reading them fails."""
    there = batch_of(device=torch.device("meta"))
    for far, micro_batch in zip(there.micro_batches, batch_of().micro_batches, strict=True):
        assert far.replay.at.device.type == "meta"
        assert far.replay.at.shape == micro_batch.replay.at.shape
        assert far.replay.micro_batch.labels.shape == micro_batch.replay.micro_batch.labels.shape


def test_loss_and_gradient_with_an_output_anchor_match_the_formula() -> None:
    tuned, base = tiny_llama(), tiny_llama(seed=1).requires_grad_(False)
    loss = TokenLoss(tuned, anchor_coefficient=0.7).train()
    anchor = OutputAnchor(loss, TokenLoss(base).eval())
    drift = 0.0
    for micro_batch in batch_of().micro_batches:
        with layout_context(micro_batch.layout):
            found: MicroBatchLosses = loss(micro_batch, anchor.outputs(micro_batch))
            (found.tokens.sum() + found.added).backward()
        drift += found.drift.sum().item()
    ours = [p.grad.clone() for p in tuned.parameters() if p.grad is not None]
    tuned.zero_grad()

    total, expected = torch.zeros(()), 0.0
    for document, source in enumerate(SOURCES):
        sample = DOCUMENTS[document]
        ids = torch.from_numpy(sample.ids.astype(np.int64))
        at = torch.from_numpy(sample.supervised).nonzero()[:, 0]
        said = tuned(input_ids=ids[None]).logits[0][at - 1].log_softmax(-1)
        total = total - said.gather(1, ids[at][:, None]).sum()
        if source == 1:
            before = logits_alone(base, document).log_softmax(-1)
            kl = (before.exp() * (before - said)).sum()
            total, expected = total + 0.7 * kl, expected + kl.item()
    total.backward()
    assert drift == pytest.approx(expected, rel=1e-5)
    theirs = [p.grad for p in tuned.parameters() if p.grad is not None]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {"type": "LoRA", "lora": {"rank": 4, "dropout": "0.2"}},
    "DoRA": {"type": "LoRA", "lora": {"rank": 4, "useDora": True}},
    "PiSSA": {"type": "LoRA", "lora": {"rank": 4, "initialization": "PiSSA"}},
    "IA3": {"type": "IA3"},
    "PromptTuning": {"type": "PromptTuning", "prompt": {"virtualTokens": 4}},
    "PrefixTuning": {"type": "PrefixTuning", "prompt": {"virtualTokens": 4}},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_model_with_its_adapter_disabled_is_the_base_model(name: str) -> None:
    spec = spec_of(ADAPTERS[name], dropout="0.2", neftuneAlpha="5")
    model = apply_method(tiny_llama(), spec)
    derive(model, spec)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # as if it had been trained
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    loss = TokenLoss(model).train()
    batch = batch_of(packed=spec.method.kind.packs)
    anchor, base, seen = OutputAnchor(loss), tiny_llama(), 0
    for micro_batch, positions in zip(
        batch.micro_batches, batch.plan.micro_batches[0], strict=True
    ):
        with layout_context(micro_batch.layout):
            before = loss(micro_batch).tokens.detach()
        found = anchor.outputs(micro_batch)
        documents = [logits_alone(base, p) for p in positions if SOURCES[p] == 1]
        seen += len(documents)
        if documents:
            assert found is not None
            torch.testing.assert_close(found.logits, torch.cat(documents), rtol=1e-4, atol=1e-5)
        with layout_context(micro_batch.layout):
            assert torch.equal(loss(micro_batch).tokens, before), (
                "the adapter and its dropout are enabled again"
            )
    assert seen == sum(SOURCES)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    assert loss.training


def test_weight_anchor_matches_the_formula() -> None:
    spec = spec_of(FULL, layerDecay="0.5", weightDecay="0", learningRate="1")
    model = apply_method(tiny_llama(), spec)
    optimizers = make_optimizers(model, spec)
    anchor = WeightAnchor(optimizers, 0.3)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    factors = {
        id(p): g["rate_factor"] for o in optimizers for g in o.param_groups for p in g["params"]
    }
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    step_if(optimizers, 0.1, torch.tensor(True))
    moved = {name: p.detach().clone() for name, p in model.named_parameters()}

    anchor.pull(0.1, torch.tensor(False))
    assert all(torch.equal(p, moved[name]) for name, p in model.named_parameters())
    anchor.pull(0.1, torch.tensor(True))
    for name, parameter in model.named_parameters():
        share = 0.1 * factors[id(parameter)] * 0.3
        expected = moved[name] - share * (moved[name] - base[name])
        torch.testing.assert_close(parameter.detach(), expected)
    assert len(set(factors.values())) > 1


def test_anchor_bytes() -> None:
    def kept(halved: bool = False, method: dict[str, Any] = FULL, **anchor: str) -> float:
        return anchor_bytes(model, spec_of(method, anchor=anchor), halved) / size

    model = tiny_llama()
    size = sum(p.numel() for p in model.parameters())
    assert kept() == 0
    assert kept(klCoefficient="1") == 4
    assert kept(klCoefficient="1", l2Coefficient="1", halved=True) == 2 + 4
    assert kept(klCoefficient="1", method={"type": "LoRA"}) == 0


def tuned(method: dict[str, Any], rate: float, **anchor: str) -> tuple[float, list[float]]:
    """Train; return the divergence from the base model on the replay documents afterwards, and the
    divergence that each step reported."""
    spec = spec_of(method, anchor=anchor)
    model, base = apply_method(tiny_llama(), spec), tiny_llama()
    plan: Any = SimpleNamespace(source_count=2, seed=0)
    session = session_of(model, spec, plan, tiny_llama() if method is FULL else None)
    if session.output_anchor is None:  # measured without being added to the loss
        session.output_anchor = OutputAnchor(session.module, TokenLoss(tiny_llama()).eval())
    told = []
    with feed_of(8) as feed:
        for batch in feed:
            sums, *_ = optimizer_step(session, batch, rate)
            told.append((sums[2] / sums[3]).item())
    after = session.module.eval()
    drift, tokens = 0.0, 0
    for document, source in enumerate(SOURCES):
        if source == 1:
            found = divergence(logits_alone(base, document), logits_alone(after.model, document))
            drift, tokens = drift + found.sum().item(), tokens + len(found)
    return drift / tokens, told


@pytest.mark.parametrize(
    ("method", "rate", "anchor"),
    [
        (FULL, 1e-2, {"klCoefficient": "10"}),
        (FULL, 1e-2, {"l2Coefficient": "20"}),
        ({"type": "LoRA"}, 5e-2, {"klCoefficient": "30"}),
    ],
)
def test_an_anchored_model_stays_closer_to_the_base_model(
    method: dict[str, Any], rate: float, anchor: dict[str, str]
) -> None:
    free, course = tuned(method, rate)
    held, _ = tuned(method, rate, **anchor)
    assert course[0] == pytest.approx(0, abs=1e-6), "measured before the first update"
    assert course[-1] > 0.01, "the model without an anchor forgets"
    assert held < 0.7 * free
