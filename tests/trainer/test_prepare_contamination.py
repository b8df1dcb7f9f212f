"""Contamination: hashed n-grams against a token by token comparison."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.prepare.quality import contamination
from finetune_trainer.prepare.quality.contamination import (
    COMMON,
    NGRAM,
    HeldOut,
    first_shared,
    most_common,
    ngrams,
)
from finetune_trainer.prepare.quality.hashsets import HashSet

SAMPLES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40), min_size=1, max_size=6)


def shard(samples: list[list[int]]) -> tuple[Any, Any]:
    starts = np.concatenate([[0], np.cumsum([len(s) for s in samples])]).astype(np.int32)
    return np.array([t for s in samples for t in s], np.int32), starts


def grams(sample: list[int]) -> list[tuple[int, ...]]:
    last = max(1, len(sample) - NGRAM + 1)
    return [tuple(sample[i : i + NGRAM]) for i in range(last)]


def shared(train: list[list[int]], *held_out: list[list[int]]) -> dict[int, Any]:
    """Tokens that training samples share with shards of held-out samples, by row."""
    with TemporaryDirectory() as folder:
        held = HeldOut(Path(folder))
        for samples in held_out:
            held.add(*shard(samples))
        return first_shared(*shard(train), HashSet(held.write()))


@given(SAMPLES)
def test_equal_hashes_are_equal_ngrams(samples: list[list[int]]) -> None:
    hashes, rows = ngrams(*shard(samples))
    expected = [(row, gram) for row, s in enumerate(samples) for gram in grams(s)]
    assert rows.tolist() == [row for row, _ in expected]
    by_gram = {gram: h for (_, gram), h in zip(expected, hashes.tolist(), strict=True)}
    assert hashes.tolist() == [by_gram[gram] for _, gram in expected]
    assert len(set(by_gram.values())) == len(by_gram)


@given(SAMPLES, SAMPLES)
def test_shared_ngrams_equal_those_of_a_full_comparison(
    train: list[list[int]], held: list[list[int]]
) -> None:
    in_samples = [set(grams(s)) for s in held]
    counted = {
        gram
        for s in in_samples
        for gram in s
        if sum(gram in other for other in in_samples) <= most_common(len(held))
    }
    expected = {}
    for row, sample in enumerate(train):
        both = [gram for gram in grams(sample) if gram in counted]
        if both:
            expected[row] = both[0]
    halves = (held[: len(held) // 2], held[len(held) // 2 :])
    found = shared(train, *(half for half in halves if half))
    assert {row: tuple(ids.tolist()) for row, ids in found.items()} == expected


def test_ngrams_of_many_held_out_samples_are_ignored_as_template() -> None:
    frame = list(range(100, 100 + NGRAM))
    held = [[*frame, i] for i in range(200)]
    few, many = held[:COMMON], held[: COMMON + 1]
    others = [[1000 + i] * 20 for i in range(200)]
    assert set(shared([frame], [*few, *others])) == {0}
    assert not shared([frame], [*many, *others])
    assert not shared([frame], held[:2]), "COMMON_SHARE limits small sets"


def test_templates_are_detected_per_set(tmp_path: Path) -> None:
    frame = list(range(100, 100 + NGRAM))
    held = HeldOut(tmp_path)
    held.add(*shard([[1000 + i] * 20 for i in range(200)]))
    held.end_set()
    held.add(*shard([[*frame, i] for i in range(6)]))
    assert set(first_shared(*shard([frame, [1003] * 20]), HashSet(held.write()))) == {1}


def test_held_out_ngrams_are_limited(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(contamination, "HELD_OUT_NGRAMS", 30)
    held = HeldOut(tmp_path)
    held.add(*shard([list(range(32))]))
    assert not held.full and held.samples == 1
    held.add(*shard([list(range(50, 82))]))
    assert held.full and len(HashSet(held.write())) == 40


def test_without_held_out_samples_nothing_is_shared() -> None:
    assert shared([[1, 2, 3]]) == {}
