"""KL(base || tuned) from the base model's likeliest tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.engine.loss import divergence
from finetune_trainer.evaluate.base_kl import (
    MOST_LABELS,
    MOST_SAMPLES,
    BaseProbabilities,
    divergence_of,
    from_bytes,
    samples_of,
    to_bytes,
)


@given(st.integers(0, 1000), st.integers(2, 40), st.floats(0.0, 8.0))
def test_the_figure_is_a_lower_bound_of_the_divergence_and_near_it(
    seed: int, kept: int, change: float
) -> None:
    random = torch.Generator().manual_seed(seed)
    base = 4 * torch.randn(5, 40, generator=random)
    tuned = base + change * torch.randn(5, 40, generator=random)
    exact = divergence(base, tuned)
    logs, tokens = base.log_softmax(-1).topk(kept)
    found = divergence_of(logs, tuned.log_softmax(-1).gather(-1, tokens))
    assert (found <= exact + 1e-4).all()
    if kept == 40:
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-4)


def test_equal_models_are_at_no_distance() -> None:
    logs, _ = torch.randn(3, 500).log_softmax(-1).topk(64)
    assert divergence_of(logs, logs).tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("supervised", "chosen"),
    [
        ([3, 0, 5, 2000, 7], [0, 2, 4]),
        ([1] * (MOST_SAMPLES + 9), list(range(MOST_SAMPLES))),
        ([1000] * 20, list(range(MOST_LABELS // 1000))),
        ([], []),
        ([5000], []),
    ],
)
def test_the_first_short_samples_are_measured(supervised: list[int], chosen: list[int]) -> None:
    assert samples_of(np.array(supervised, np.int32)).tolist() == chosen


def test_the_file_holds_what_was_kept() -> None:
    def of(labels: int) -> BaseProbabilities:
        return BaseProbabilities(
            np.arange(labels * 2, dtype=np.int32).reshape(-1, 2),
            np.full((labels, 2), -labels, np.float32),
        )

    for kept in ({7: of(3), 2: of(1)}, {}):
        again = from_bytes(to_bytes(kept))
        assert again.keys() == kept.keys()
        for position, found in again.items():
            assert np.array_equal(found.tokens, kept[position].tokens)
            assert np.array_equal(found.logs, kept[position].logs)
