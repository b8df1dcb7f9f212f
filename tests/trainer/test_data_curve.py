"""The data curve: which samples a part has, what the values say, and what is advised."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from finetune_api.evaluation_results import (
    TUNED,
    DataCurve,
    DataCurvePoint,
    Estimate,
    GateResult,
    Recommendation,
    SetCurve,
    SetTable,
)
from finetune_api.tasks import METRICS, kinds_of
from finetune_trainer.evaluate.data_curve import next_gain, set_curve, with_advice
from finetune_trainer.evaluate.table import Answered, RowOutcome
from finetune_trainer.prepared.dataset import Reference
from finetune_trainer.train.training_plan import part_of


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=200),
    st.floats(0.01, 1), st.floats(0.01, 1), st.integers(0, 99),
)  # fmt: skip
def test_parts_are_nested_and_have_the_same_share_of_each_source(
    sources: list[int], one: float, other: float, seed: int
) -> None:
    of = np.array(sources)
    small, large = (part_of(of, share, seed) for share in sorted((one, other)))
    assert set(small) <= set(large)
    assert (np.diff(small) > 0).all()
    for source in set(sources):
        count = sources.count(source)
        assert (of[small] == source).sum() == math.ceil(min(one, other) * count)
    assert part_of(of, 1.0, seed).tolist() == list(range(len(of)))


@given(
    st.floats(-2, 2), st.floats(-2, 2), st.floats(0.05, 3), st.integers(4, 10_000)
)  # fmt: skip
def test_the_next_gain_is_that_of_the_power_law(a: float, b: float, c: float, n: int) -> None:
    def value(samples: float) -> float:
        return a + b * samples**-c

    expected = value(2 * n) - value(n)
    assume(abs(expected) > 1e-4)
    found = next_gain([value(n / 4), value(n / 2), value(n)])
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "values",
    [
        (0.25, 0.5, 0.75), (0.2, 0.3, 0.5), (0.2, 0.4, 0.3), (0.3, 0.3, 0.4), (0.4, 0.3, 0.4),
        (None, 0.4, 0.5), (0.4, 0.5),
    ],
)  # fmt: skip
def test_without_falling_gains_of_one_sign_there_is_no_power_law(values: Any) -> None:
    assert next_gain(values) is None


def row(right: int, of: int) -> RowOutcome:
    """A row that is right for the first samples."""
    references = [Reference(np.zeros(1, np.int32), "p", "a", "a") for _ in range(of)]
    answers = ["a"] * right + ["b"] * (of - right)
    return RowOutcome([Answered(TUNED, range(of), answers)], references, np.arange(of))


def curve_of(quarter: int | None, half: int | None, whole: int, of: int = 400) -> SetCurve:
    parts = [None if right is None else row(right, of) for right in (quarter, half)]
    found = set_curve("set", parts, row(whole, of), kinds_of("Loss", "Accuracy"), 2)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("rights", "helps", "words"),
    [
        ((160, 240, 300), True, "twice the data would bring about +11.3 % more"),
        ((200, 240, 300), True, "more of the same data would help"),
        ((100, 200, 260), True, "more of the same data would help"),
        ((100, 270, 290), False, "would bring little"),  # +5 points, and then 0.6
        ((100, 300, 400), False, "twice the data would bring about +0.0 % more"),
        ((100, 290, 380), True, "twice the data would bring about +5.0 % more"),
        ((300, 300, 300), False, "would not help"),
        ((300, 320, 290), False, "would not help"),
        ((None, 240, 300), True, "more of the same data would help"),
        ((160, None, 300), None, "is not known"),
    ],
)
def test_what_the_values_say(rights: Any, helps: bool | None, words: str) -> None:
    found = curve_of(*rights)
    assert found.more_helps is helps, found.because
    assert words in found.because and found.metric == "Accuracy"


def test_few_test_samples_say_nothing() -> None:
    found = curve_of(5, 10, 12, of=24)
    assert found.more_helps is None and found.comparison is not None
    assert found.comparison.verdict == "TooFewSamples"
    assert set_curve("set", [None, None], row(1, 4), kinds_of("Accuracy"), 2) is None
    assert set_curve("set", [row(1, 4)] * 2, row(1, 4), {}, 2) is None


def advised(
    curve: SetCurve, action: Any, gate: bool | None = None, retention: bool = False
) -> Recommendation | None:
    known = action and Recommendation(action=action, row="r", metric="Accuracy", because="why")
    table = SetTable(name="set", rows=[], recommendation=known, retention=retention)
    points = [DataCurvePoint(share=1, samples=8, steps=1)]
    gates = [
        GateResult(
            data_set=name, metric="Accuracy", operator="AtLeast", passed=passed, because="figures"
        )
        for name, passed in (("set", gate), ("other", False))
        if passed is not None
    ]
    found = with_advice(table, DataCurve(points=points, sets=[curve]), gates, METRICS, 2)
    assert with_advice(table, None, gates, METRICS, 2) == table
    return found.recommendation


RISES, FLAT = curve_of(160, 240, 300), curve_of(300, 300, 300)


@pytest.mark.parametrize(
    ("curve", "action", "gate", "expected"),
    [
        (RISES, "Tune", None, "CollectMoreData"),
        (RISES, "TuneAndRetrieve", None, "CollectMoreData"),
        (RISES, "Tune", False, "CollectMoreData"),
        (RISES, "Tune", True, "Tune"),
        (RISES, "Prompt", None, "Prompt"),
        (RISES, "Prompt", False, "CollectMoreData"),
        (RISES, None, False, "CollectMoreData"),
        (RISES, "Neither", None, "Neither"),
        (FLAT, "Tune", None, "Tune"),
        (FLAT, "Tune", False, "Tune"),
        (curve_of(300, 350, 399), "Tune", None, "Tune"),
    ],
)
def test_more_data_is_advised_where_it_helps_and_the_target_is_missed(
    curve: SetCurve, action: Any, gate: bool | None, expected: str
) -> None:
    found = advised(curve, action, gate)
    assert found is not None and found.action == expected
    assert curve.because in found.because
    assert action is None or "why" in found.because


def test_sets_without_a_target_or_a_curve_stay_as_they_are() -> None:
    assert advised(RISES, None) is None
    kept = advised(RISES, "Tune", retention=True)
    assert kept is not None and kept.because == "why"
    other = advised(RISES.model_copy(update={"data_set": "other"}), "Tune")
    assert other is not None and other.because == "why"
    loss = RISES.model_copy(update={"metric": "Loss", "values": [None, None, Estimate(value=2.0)]})
    found = advised(loss, "Tune")
    assert found is not None and found.action == "Tune", "a loss has no best value"
