"""The choice of ``evaluation.remedy``: limits, what qualifies, what is chosen; and the halves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from finetune_api.evaluation import Evaluation
from finetune_trainer.evaluate.comparisons import Outcome
from finetune_trainer.evaluate.remedy import MeasuredPoint, choose, limits_of
from finetune_trainer.evaluate.scores import answers_to
from finetune_trainer.prepared.halves import halves

SAMPLES = 60
LABELS = np.full(SAMPLES, 4.0)


def evaluation(**fields: Any) -> Evaluation:
    return Evaluation.model_validate({"remedy": {"scan": "Interpolation"}, **fields})


def gate(data_set: str, value: str, **fields: str) -> dict[str, str]:
    gate = {"metric": "Loss", "operator": "WorsensAtMost", "value": value, "dataSet": data_set}
    return gate | fields


def outcome(change: float, spread: float = 0.0, groups: int = SAMPLES) -> Outcome:
    """Losses that differ from those of the base model by a change, up and down by a spread."""
    each = 1.0 + change + spread * np.where(np.arange(SAMPLES) % 2, 1, -1)
    numbers = np.arange(SAMPLES) % groups
    return Outcome(LABELS * each, LABELS, answers_to([], []), loss_groups=numbers)


def point(at: float, validation: float, **retention: float | Outcome) -> MeasuredPoint:
    found: Mapping[str, Outcome] = {
        name: what if isinstance(what, Outcome) else outcome(what)
        for name, what in retention.items()
    }
    return MeasuredPoint(at, validation, found)


@pytest.mark.parametrize(
    ("gates", "expected"),
    [
        ([], {"general": 0.02, "code": 0.02}),
        ([gate("general", "0.1")], {"general": 0.1, "code": 0.02}),
        ([gate("general", "0.1"), gate("general", "0.05")], {"general": 0.05, "code": 0.02}),
        ([gate("general", "0.1", row="Current")], {"general": 0.02, "code": 0.02}),
        ([gate("code", "0.1", operator="BetterThan")], {"general": 0.02, "code": 0.02}),
        ([gate("code", "0.1", metric="ExactMatch")], {"general": 0.02, "code": 0.02}),
    ],
)
def test_limits_are_those_of_the_gates(
    gates: list[dict[str, str]], expected: dict[str, float]
) -> None:
    assert limits_of(evaluation(gates=gates), ["general", "code"]) == expected


BASE = point(0, 3.0, general=0.0)

CASES: dict[str, tuple[list[MeasuredPoint], float | None, str]] = {
    "the tuned model qualifies": (
        [point(1, 1.0, general=0.01), point(0.6, 1.2, general=0.0), BASE],
        1, "the tuned model as it is, with the lowest validation loss of the points that qualify"
        " (2 of 2): 1 (tuned 1, base 3)",
    ),
    "a point before it": (
        [point(1, 1.0, general=0.5), point(0.8, 1.1, general=0.1), point(0.6, 1.2, general=0.01),
         point(0.4, 1.4, general=-0.1), BASE],
        0.6, "point 0.6, with the lowest validation loss of the points that qualify (2 of 4): 1.2"
        " (tuned 1, base 3); general Loss +0.01, at most +0.01 (limit 0.02)",
    ),
    "a point that is better than the tuned model": (
        [point(1, 1.0, general=0.0), point(0.8, 0.9, general=0.0), BASE], 0.8, "point 0.8",
    ),
    "of equal points the nearest to the tuned model": (
        [point(1, 1.0, general=0.5), point(0.8, 1.1, general=0.0), point(0.6, 1.1, general=0.0),
         BASE],
        0.8, "point 0.8",
    ),
    "no point": (
        [point(1, 1.0, general=0.5), point(0.5, 1.1, general=0.25), BASE],
        None, "no point qualifies, so the tuned model is kept as it is. The nearest is 0.5:"
        " general Loss +0.25, at most +0.25 (limit 0.02)",
    ),
    "the base model is no choice": (
        [point(1, 4.0, general=0.5), BASE], None, "The nearest is 1",
    ),
    "all sets count": (
        [point(1, 1.0, general=0.0, code=0.3), point(0.5, 2.0, general=0.0, code=0.0),
         point(0, 3.0, general=0.0, code=0.0)],
        0.5, "code Loss",
    ),
    "the interval counts, not its middle": (
        [point(1, 1.0, general=outcome(0.0, spread=0.2)), point(0.5, 2.0, general=0.0), BASE],
        0.5, "point 0.5",
    ),
    "few groups decide nothing": (
        [point(at, 3.0 - at, general=outcome(0.0, groups=19)) for at in (1, 0)],
        None, "no point qualifies",
    ),
    "losses that are not finite": (
        [point(1, math.nan, general=0.0), point(0.8, 1.0, general=math.inf),
         point(0.6, 2.0, general=0.0), BASE],
        0.6, "(tuned unknown, base 3)",
    ),
    "nothing is finite": (
        [point(1, math.nan, general=math.nan), BASE], None, "general Loss unknown, at most unknown",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("points", "chosen", "because"), CASES.values(), ids=CASES)
def test_the_choice(points: list[MeasuredPoint], chosen: float | None, because: str) -> None:
    found = choose(evaluation(), points)
    assert found.chosen == chosen
    assert because in found.because
    assert [each.point for each in found.points] == [each.point for each in points]
    assert type(found).model_validate_json(found.model_dump_json(by_alias=True)) == found


def test_a_change_is_that_of_a_gate() -> None:
    found = choose(evaluation(), [point(1, 1.0, general=outcome(0.1, spread=0.2)), BASE])
    (change,) = found.points[0].retention
    assert (change.loss, change.change) == (pytest.approx(1.1), pytest.approx(0.1))
    assert change.low is not None and change.high is not None
    assert 0.03 < change.low < 0.1 < change.high < 0.17


# --- halves ---------------------------------------------------------------------------------------

DIGESTS = st.lists(st.text("0123456789abcdef", min_size=32, max_size=32), unique=True, min_size=1)


@given(DIGESTS, st.integers(1, 5), st.integers(0, 2**31 - 1), st.randoms())
def test_a_half_depends_on_the_texts_of_the_group_alone(
    digests: list[str], size: int, seed: int, random: Any
) -> None:
    groups = [number // size for number in range(len(digests))]
    found = dict(zip(digests, halves(digests, groups, seed), strict=True))
    order = list(range(len(digests)))
    random.shuffle(order)
    numbers = random.sample(range(len(digests)), len(digests))
    again = halves([digests[i] for i in order], [numbers[groups[i]] for i in order], seed)
    assert dict(zip((digests[i] for i in order), again, strict=True)) == found
    first = [i for i in range(len(digests)) if groups[i] == groups[0]]
    alone = halves([digests[i] for i in first], [0] * len(first), seed)
    assert alone == [found[digests[i]] for i in first], "whatever other samples there are"
    assert len(set(alone)) == 1, "a group stays together"


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_halves_are_about_equal(seed: int) -> None:
    digests = [f"{number:032x}" for number in range(2000)]
    chooses = halves(digests, list(range(2000)), seed)
    assert binomtest(sum(chooses), 2000).pvalue > 1e-3
    together = halves(digests, [number // 4 for number in range(2000)], seed)
    assert binomtest(sum(together[::4]), 500).pvalue > 1e-3
