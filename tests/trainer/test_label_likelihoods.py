"""Log-likelihoods of labels equal those of prompt and label computed whole, one by one: for any
model and method, any batch size, and one or two processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engine import CPU, spec_of, tiny_jamba, tiny_llama, tiny_mixtral
from label_worker import LABELS, PROMPTS, evaluator, score
from transformers import AutoModelForCausalLM, GPT2Config, MistralConfig
from tuning import Tuning
from worlds import forked

from finetune_trainer.engine.loss import TokenLoss
from finetune_trainer.evaluate import label_likelihoods, prompt_batches
from finetune_trainer.evaluate.cached_model import CachedModel
from finetune_trainer.evaluate.label_likelihoods import LabelLikelihoods
from ports import free_port
from variants import beyond

WORLD: Any = SimpleNamespace(
    rank=0, size=1, device=CPU, autocast=nullcontext, on_all=lambda work: [work()]
)


def whole(model: Any, prompt: np.ndarray, label: tuple[int, ...]) -> float:
    """Log-likelihood of a label by a pass over prompt and label."""
    ids = torch.tensor([*prompt.tolist(), *label[:-1]])[None]
    with torch.no_grad():
        scores = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    scores = scores[-ids.shape[1] :]  # without virtual tokens in front
    return float(sum(scores[len(prompt) - 1 + i, token] for i, token in enumerate(label)))


def mistral() -> Any:
    """A model whose attention reaches back less far than the prompts."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=6,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def gpt2() -> Any:
    """A model of few learned positions."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=26)
    )


MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny_llama, "gpt2": gpt2, "sliding": mistral, "experts": tiny_mixtral,
    "recurrent": tiny_jamba,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind",),
    beyond([(kind,) for kind in MODELS], lambda kind: kind not in ("experts", "recurrent")),
)
def test_scores_are_those_of_whole_texts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = TokenLoss(MODELS[kind]())
    naive = [[whole(loss.model.eval(), p, label) for label in LABELS.values()] for p in PROMPTS]
    loss.train()
    monkeypatch.setattr(prompt_batches, "LEAST_TOKENS", 10)
    for tokens in (16384, 60, 30):  # all at once; few prompts; a row a pass
        monkeypatch.setattr(prompt_batches, "MOST_TOKENS", tokens)
        monkeypatch.setattr(label_likelihoods, "MOST_TOKENS", tokens)
        found = evaluator(WORLD, loss).label_scores(0, PROMPTS, ["LabelAccuracy"])
        assert found is not None
        np.testing.assert_allclose(found.values, naive, atol=1e-4)
    assert loss.training, "as before"
    assert found.labels == list(LABELS) and found.tokens == [len(x) for x in LABELS.values()]
    assert evaluator(WORLD, loss).label_scores(0, PROMPTS, ["Accuracy"]) is None


def test_a_prompt_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of each pass: of the prompts once (what they share once for all), and of the rows."""
    model, seen = tiny_llama(), list[tuple[int, ...]]()
    model.register_forward_pre_hook(
        lambda _, __, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    draw = np.random.default_rng(0)
    prompts = [draw.integers(1, 96, n).astype(np.int32) for n in (20, 18, 20)]
    cached = CachedModel(model, CPU, 0, virtual=False, sharded=False)
    one, several = [(1,), (2,), (3,)], [(1, 2), (1, 3), (4, 5)]
    LabelLikelihoods(cached, one, 20)(prompts)
    assert seen == [(3, 20)], "labels of one token need no second pass"
    seen.clear()
    LabelLikelihoods(cached, several, 20)(prompts)
    assert seen == [(3, 20), (6, 1)]
    seen.clear()
    alike = [np.concatenate([np.arange(1, 31, dtype=np.int32), prompt]) for prompt in prompts]
    found = LabelLikelihoods(cached, several, 50)(alike)
    assert seen == [(1, 30), (3, 20), (6, 1)]
    naive = [[whole(model.eval(), p, label) for label in several] for p in alike]
    np.testing.assert_allclose(found, naive, atol=1e-4)


def test_a_prompt_without_room_for_the_labels_loses_its_beginning() -> None:
    model = gpt2()
    prompts = [np.arange(1, 27, dtype=np.int32), PROMPTS[0]]
    found = evaluator(WORLD, TokenLoss(model)).label_scores(0, prompts, ["LabelAccuracy"])
    room = 26 - max(len(label) - 1 for label in LABELS.values())
    naive = [[whole(model.eval(), p[-room:], x) for x in LABELS.values()] for p in prompts]
    assert found is not None
    np.testing.assert_allclose(found.values, naive, atol=1e-4)


@pytest.mark.parametrize(
    ("name",),
    beyond([("PromptTuning",), ("PrefixTuning",), ("LoRA",)], lambda name: name == "PromptTuning"),
)
def test_tuned_and_base_model(tmp_path: Path, name: str) -> None:
    tiny_llama().save_pretrained(tmp_path)
    method: dict[str, Any] = {"type": name}
    if name != "LoRA":
        method["prompt"] = {"virtualTokens": 5}
    tuning = Tuning(tmp_path, spec_of(method, dropout="0.2"))
    if name == "LoRA":
        tuning.step(0)
    virtual = 0 if name == "LoRA" else 5
    tuned = evaluator(WORLD, tuning.loss, virtual).label_scores(0, PROMPTS, ["LabelAccuracy"])
    with tuning.loss.base_model():
        base = evaluator(WORLD, tuning.loss, virtual).label_scores(0, PROMPTS, ["LabelAccuracy"])
    model = tuning.model.eval()
    naive = [[whole(model, p, label) for label in LABELS.values()] for p in PROMPTS]
    plain = tiny_llama().eval()
    of_base = [[whole(plain, p, label) for label in LABELS.values()] for p in PROMPTS]
    assert tuned is not None and base is not None
    np.testing.assert_allclose(tuned.values, naive, atol=1e-4)
    np.testing.assert_allclose(base.values, of_base, atol=1e-4)


@pytest.mark.parametrize(
    ("sharding",), beyond([("FullShard",), ("NoShard",)], lambda kind: kind == "FullShard")
)
def test_two_processes_find_what_one_finds(tmp_path: Path, sharding: str) -> None:
    """Also where the ranks have unequal numbers of batches."""
    port = free_port()
    ranks = [forked(score, rank, 2, port, sharding, str(tmp_path)) for rank in range(2)]
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    alone = evaluator(WORLD, TokenLoss(tiny_llama())).label_scores(0, PROMPTS, ["LabelAccuracy"])
    assert alone is not None
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        np.testing.assert_allclose(found, alone.values, atol=1e-4)
