"""What may differ between a tested model and the one that was published of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.engine.precision import FP32, Precision
from finetune_trainer.evaluate.agreement import (
    SHORT,
    Agreement,
    Bound,
    Outcome,
    bound_of,
    choose,
    compare,
    same_answer,
    same_tokens,
)

BF16, FP8 = Precision(), Precision(fp8=True)


@pytest.mark.parametrize(
    ("tested", "quantized", "published", "sample"),
    [
        (FP32, False, torch.float32, 1e-3),
        (FP32, False, torch.bfloat16, 0.25),
        (FP32, False, torch.float16, 0.25),
        (BF16, False, torch.float32, 0.25),
        (BF16, False, torch.bfloat16, 0.25),
        (BF16, True, torch.bfloat16, 1.0),
        (FP32, True, torch.float32, 1.0),
        (FP8, False, torch.bfloat16, 1.0),
    ],
)
def test_the_bound_follows_from_the_number_formats(
    tested: Precision, quantized: bool, published: torch.dtype, sample: float
) -> None:
    found = bound_of(tested, quantized, published)
    assert (found.sample, found.mean <= found.sample) == (sample, True)


@given(st.lists(st.lists(st.integers(1, 2 * SHORT), max_size=40), max_size=24), st.integers(1, 20))
def test_chosen_samples_are_few_fixed_and_spread(lengths: list[list[int]], most: int) -> None:
    arrays = [np.array(of, np.int32) for of in lengths]
    chosen = choose(arrays, most)
    assert chosen == choose(arrays, most)
    assert [len(c) for c in chosen] == [len(set(c)) for c in chosen]
    assert all(c == sorted(c) and all(0 <= n < len(of) for n in c)
               for c, of in zip(chosen, lengths, strict=True))  # fmt: skip
    filled = [c for c, of in zip(chosen, lengths, strict=True) if of]
    assert sum(map(len, chosen)) <= most
    assert sum(map(bool, filled)) == min(most, len(filled)), "every set has a sample, if possible"
    for c, of in zip(chosen, lengths, strict=True):
        if any(length <= SHORT for length in of):
            assert all(of[n] <= SHORT for n in c)
        else:
            assert all(of[n] == min(of) for n in c)


def test_samples_of_a_set_are_evenly_spread() -> None:
    one, other = (np.full(n, 9, np.int32) for n in (100, 3))
    assert choose([one, other], 8) == [[0, 25, 50, 74, 99], [0, 1, 2]]


BOUND = Bound(sample=0.1, mean=0.02, differing=0.25)
NAMES = ["sample 1", "sample 2", "sample 3", "sample 4"]


def agreement(found: list[float], same: list[bool | None] | None = None) -> Agreement:
    outcomes = [Outcome(a, b) for a, b in zip(found, same or [None] * 4, strict=True)]
    return compare([1.0, 1.0, 0.0, 2.0], outcomes, NAMES, BOUND)


@pytest.mark.parametrize(
    ("found", "same", "said"),
    [
        ([1.0, 1.0, 0.0, 2.0], None, None),
        ([1.19, 0.81, 0.0, 2.0], None, None),
        ([1.0, 1.0, 0.11, 2.0], None, "sample 3 has loss 0.11, tested 0 nats per label (allowed"),
        ([1.0, 1.21, 0.0, 1.8], None, "sample 2 has loss 1.21"),
        ([1.0, math.nan, 0.0, 2.0], None, "sample 2 has loss nan"),
        ([1.0, 1.0, 0.0, math.inf], None, "sample 4 has loss inf"),
        ([1.05, 1.05, 0.05, 2.05], None, "the mean loss of 4 samples is 1.05, tested 1 nats"),
        ([1.0, 1.0, 0.0, 2.0], [True, False, True, False], None),
        ([1.0, 1.0, 0.0, 2.0], [False, None, None, None], None),
        ([1.0, 1.0, 0.0, 2.0], [True, False, False, False],
         "3 of 4 answers differ from the tested ones, first that to sample 2 (allowed: 2)"),
    ],
)  # fmt: skip
def test_losses_and_answers_differ_by_no_more_than_the_bound(
    found: list[float], same: list[bool | None] | None, said: str | None
) -> None:
    result = agreement(found, same)
    if said is None:
        assert result.difference is None
        assert result.largest == pytest.approx(
            max(abs(a - b) for a, b in zip(found, [1.0, 1.0, 0.0, 2.0], strict=True))
        )
    else:
        assert said in (result.difference or "")
    assert result.of == sum(s is not None for s in same or [])
    assert result.equal == sum(s is True for s in same or [])


@pytest.mark.parametrize(
    ("tested", "said", "ended", "must_end", "same"),
    [
        ("red", "red", True, True, True),
        ("red", "red", True, False, True),
        ("red", "re", True, True, False),
        ("red rose", "red", False, False, True),
        ("red rose", "rad", False, False, False),
        ("red", "red", False, True, False),  # the tested answer ended here: a lost stop token
        ("köln", "k\ufffd", False, False, True),  # half of a character
        ("red", "redder", False, False, False),
    ],
)
def test_answers_are_compared_as_far_as_both_go(
    tested: str, said: str, ended: bool, must_end: bool, same: bool
) -> None:
    assert same_answer(tested, said, ended, must_end=must_end) is same


@pytest.mark.parametrize(
    ("prepared", "tokens", "answered", "cut", "same"),
    [
        ([1, 2, 3], [1, 2, 3], 0, False, True),
        ([1, 2, 3], [1, 2, 4], 0, False, False),
        ([1, 2, 3], [9, 1, 2, 3], 0, False, False),  # a begin token that training did not see
        ([1, 2, 3], [1, 2, 3, 9], 0, False, True),
        ([1, 2, 3], [9, 1, 2, 3], 0, True, True),
        ([1, 7, 8], [1, 4, 5, 6, 7, 8], 0, True, True),  # shortened behind the begin token
        ([1, 7, 8], [2, 4, 5, 6, 7, 8], 0, True, False),
        ([1, 2, 3], [1, 2], 0, True, False),
        ([], [], 0, False, True),
        ([1, 2, 3, 4, 5], [1, 9, 9, 4, 5], 2, False, True),  # borders of earlier answers
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 6], 2, False, False),
    ],
)
def test_prompts_have_the_prepared_tokens(
    prepared: list[int], tokens: list[int], answered: int, cut: bool, same: bool
) -> None:
    assert same_tokens(np.array(prepared, np.int32), tokens, answered, cut=cut) is same


@given(st.lists(st.integers(0, 3), max_size=12), st.data())
def test_a_shortened_sample_has_the_first_and_last_tokens(
    tokens: list[int], data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, len(tokens)))
    end = data.draw(st.integers(start, len(tokens)))
    assert same_tokens(np.array(tokens[:start] + tokens[end:], np.int32), tokens, cut=True)
