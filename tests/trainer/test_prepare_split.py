"""Split, duplicates and overlength: properties of the pure functions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.failures import DataError
from finetune_trainer.prepare.quality.duplicates import DIGEST_BYTES, Seen, digest_of
from finetune_trainer.prepare.rendering.examples import RenderedExample, Segment
from finetune_trainer.prepare.tokenizing.tokens import TokenizedSample, fit
from finetune_trainer.prepared.split import Shares, position, side_of

SHARES = st.builds(
    Shares,
    validation=st.floats(0, 0.5, exclude_max=True),
    test=st.floats(0, 0.5),
    seed=st.integers(0, 2**31 - 1),
)


@given(SHARES, st.text(), st.floats(0, 0.4))
def test_the_validation_share_does_not_change_the_test_set(
    shares: Shares, group: str, validation: float
) -> None:
    other = Shares(validation, shares.test, shares.seed)
    assert (side_of(group, shares) == "test") == (side_of(group, other) == "test")


@given(st.text(), st.integers(0, 2**31 - 1), st.floats(0, 0.9), st.floats(0, 0.1))
def test_a_larger_share_only_takes_from_training(
    group: str, seed: int, share: float, more: float
) -> None:
    if side_of(group, Shares(share, 0.0, seed)) == "validation":
        assert side_of(group, Shares(share + more, 0.0, seed)) == "validation"


def test_shares_are_exact_within_noise_and_seeds_differ() -> None:
    groups = [f"group {i}" for i in range(20_000)]
    sides = [side_of(g, Shares(0.05, 0.1, 7)) for g in groups]
    assert sides.count("test") == pytest.approx(2000, abs=150)
    assert sides.count("validation") == pytest.approx(1000, abs=110)
    assert sides != [side_of(g, Shares(0.05, 0.1, 8)) for g in groups]
    assert all(0 <= position(7, g) < 1 for g in groups[:1000])


def test_zero_shares_hold_nothing_out() -> None:
    assert {side_of(str(i), Shares(0.0, 0.0, 0)) for i in range(2000)} == {"train"}


@given(st.lists(st.lists(st.integers(0, 40), max_size=30), max_size=12))
def test_duplicates_equal_those_of_a_python_set(batches: list[list[int]]) -> None:
    seen, known = Seen(), set()
    for batch in batches:
        found = seen.add([digest_of([str(i)]) for i in batch])
        for i, duplicate in zip(batch, found, strict=True):
            assert duplicate == (i in known)
            known.add(i)


def test_digests_with_equal_first_words_are_distinguished() -> None:
    first, second = b"a" * 16, b"a" * 8 + b"b" * 8
    seen = Seen()
    assert seen.add([first]) == [False]
    assert seen.add([second, first]) == [False, True]
    assert seen.add([second, first]) == [True, True]


def test_a_million_digests_take_16_bytes_each() -> None:
    seen = Seen()
    data = np.random.default_rng(0).bytes(DIGEST_BYTES * 1_000_000)
    digests = [data[i : i + DIGEST_BYTES] for i in range(0, len(data), DIGEST_BYTES)]
    for start in range(0, len(digests), 50_000):
        assert not any(seen.add(digests[start : start + 50_000]))
    assert seen.nbytes == len(data)


def test_digests_depend_on_the_borders_of_texts() -> None:
    assert digest_of(["ab", "c"]) != digest_of(["a", "bc"])


# --- overlength ----------------------------------------------------------------------------------

BOS = 1


def sample(prompt: int, answers: list[tuple[int, int]], bos: bool) -> TokenizedSample:
    """``prompt`` tokens, then (read, supervised) spans; token ids encode their position."""
    ids, spans = list(range(1000, 1000 + prompt)), []
    for read, learned in answers:
        ids += range(2000 + len(ids), 2000 + len(ids) + read)
        spans.append((len(ids), len(ids) + learned))
        ids += range(3000 + len(ids), 3000 + len(ids) + learned)
    if bos:
        ids[0] = BOS
    example = RenderedExample(
        "s3://b/a.jsonl, line 3", (Segment("", True),), "", "", None, "", True, "train", ""
    )
    return TokenizedSample(example, np.array(ids, np.int32), tuple(spans), spans[-1][0])


SAMPLES = st.builds(
    sample,
    prompt=st.integers(1, 30),
    answers=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 30)), min_size=1, max_size=4),
    bos=st.booleans(),
)


@given(SAMPLES, st.integers(8, 60))
def test_truncation_keeps_the_answer_and_the_bos_token(whole: TokenizedSample, limit: int) -> None:
    cut, what = fit(whole, limit, "Truncate", BOS)
    assert cut is not None
    if len(whole.ids) <= limit:
        assert what == "None" and cut is whole
        return
    assert len(cut.ids) <= limit
    assert cut.prompt_length >= 1
    answer = whole.ids[whole.prompt_length :]
    kept = cut.ids[cut.prompt_length :]
    assert (kept == answer[: len(kept)]).all()
    if what == "Prompt":
        assert len(kept) == len(answer) and len(cut.ids) == limit
    else:
        assert what == "Completion" and len(answer) > limit - 2
    if whole.ids[0] == BOS:
        assert cut.ids[0] == BOS
    # Of the kept tokens the same are supervised as before, except the first.
    learned = {int(whole.ids[i]) for s, e in whole.spans for i in range(s, e)}
    mask = np.zeros(len(cut.ids), bool)
    for start, end in cut.spans:
        assert 1 <= start < end <= len(cut.ids)
        mask[start:end] = True
    for i, token in enumerate(cut.ids.tolist()):
        assert mask[i] == (i > 0 and token in learned)


def test_drop_drops_and_fail_names_record_length_and_limit() -> None:
    whole = sample(20, [(0, 5)], bos=False)
    assert fit(whole, 24, "Drop", None) == (None, "Dropped")
    assert fit(whole, 25, "Fail", None) == (whole, "None")
    with pytest.raises(DataError, match=r"line 3: 25 tokens, but training.maxLength is 24") as e:
        fit(whole, 24, "Fail", None)
    assert e.value.reason == "Overlength"
