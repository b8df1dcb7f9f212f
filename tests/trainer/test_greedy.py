"""Greedy answers from a cache with room equal those of transformers' ``generate``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from engine import CPU, tiny_jamba
from hypothesis import given
from hypothesis import strategies as st
from label_worker import PROMPTS
from test_label_likelihoods import MODELS
from transformers import GenerationConfig

from finetune_trainer.evaluate import prompt_batches
from finetune_trainer.evaluate.cached_model import CachedModel
from finetune_trainer.evaluate.prompt_batches import (
    LEAST_TOKENS,
    LITTLE_PADDING,
    common,
    groups_of,
    padded,
    parts_of,
)
from variants import beyond

MOST = 6
START = np.arange(1, 25, dtype=np.int32)


def cached_model(model: Any, **options: bool) -> CachedModel:
    return CachedModel(model, CPU, 0, **({"virtual": False, "sharded": False} | options))


@pytest.mark.parametrize(
    ("kind", "stops", "shares"),
    beyond(
        [
            (kind, stops, shares)
            for kind in ("llama", "gpt2", "sliding", "experts")
            for stops in (1, 40)
            for shares in (False, True)
            if not (kind == "gpt2" and shares)  # it has too few positions
        ],
        lambda kind, stops, shares: kind != "experts" and stops == 40,
    ),
)
def test_answers_are_those_of_transformers(
    kind: str, stops: int, shares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few and with many tokens that end an answer, so that some answers end early. Prompts are
    read in several parts."""
    monkeypatch.setattr(prompt_batches, "LEAST_TOKENS", 10)
    model: Any = MODELS[kind]().eval()
    prompts = [np.concatenate([START, prompt]) for prompt in PROMPTS] if shares else PROMPTS
    ends = np.random.default_rng(0).choice(np.arange(1, 97), stops, replace=False).tolist()
    ids, mask = padded(prompts, 0, CPU)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=MOST, eos_token_id=ends, pad_token_id=0, use_cache=True
    )
    with torch.no_grad():
        wanted = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        found = cached_model(model).greedy(prompts, ends, MOST)
    assert torch.equal(found, wanted[:, ids.shape[1] :])
    if stops > 1:
        lengths = (found != 0).sum(1)
        assert lengths.min() < lengths.max(), "some answers end before others"


def test_documents_that_have_ended_are_not_computed() -> None:
    """Rows of each pass, where tokens are told: all but one answer end at the second token."""
    model: Any = MODELS["llama"]().eval()
    told, rows = iter([[5, 5, 5, 5], [9, 9, 9, 7], [7], [9]]), []

    def tell(_: Any, __: Any, out: Any) -> Any:
        rows.append(len(out.logits))
        out.logits = torch.nn.functional.one_hot(torch.tensor(next(told)), 97)[:, None].float()
        return out

    model.register_forward_hook(tell)
    with torch.no_grad():
        found = cached_model(model).greedy(PROMPTS[:4], [9], 10)
    assert rows == [4, 4, 1, 1]
    assert found.tolist() == [[5, 9, 0, 0]] * 3 + [[5, 7, 7, 9]]


def test_states_and_virtual_tokens_are_left_to_transformers() -> None:
    assert not cached_model(tiny_jamba()).reuses
    assert not cached_model(MODELS["llama"](), virtual=True).reuses
    sharded = cached_model(MODELS["llama"](), sharded=True)
    assert sharded.reuses and not sharded.shares
    window = cached_model(MODELS["sliding"]())
    assert window.reuses and not window.shares


def test_prompts_behind_the_same_examples_are_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = START, START[::-1]
    prompts = [
        np.concatenate([start, prompt])
        for start, prompt in zip([first, second, first, second, first], PROMPTS[:5], strict=True)
    ]
    prompts.append(np.arange(50, 90, dtype=np.int32))
    monkeypatch.setattr(prompt_batches, "LEAST_GROUP", 2)
    groups = [sorted(group) for group in groups_of(prompts)]
    assert groups == [[0, 2, 4], [1, 3], [5]]
    assert [common([prompts[i] for i in group]) for group in groups[:2]] == [len(START)] * 2
    assert common([first, first]) == len(START) - 1, "a token is left to predict from"
    assert common([first[:1], first]) == 0


@given(st.lists(st.integers(1, 900), min_size=1, max_size=40))
def test_parts_hold_each_prompt_once_with_little_padding(lengths: list[int]) -> None:
    lengths.sort(reverse=True)
    parts = parts_of(lengths)
    assert [n for part in parts for n in lengths[part]] == lengths
    for part in parts:
        some = lengths[part]
        padding = [n for n in some if n < LITTLE_PADDING * some[0]]
        assert len(padding) * some[0] <= LEAST_TOKENS + some[0]


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=12))
def test_each_prompt_is_in_one_group(tokens: list[list[int]]) -> None:
    groups = groups_of([np.array(prompt, np.int32) for prompt in tokens])
    assert sorted(i for group in groups for i in group) == list(range(len(tokens)))
