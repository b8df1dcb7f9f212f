"""Labels chosen by log-likelihoods, and calibration, on values that can be computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.evaluation_results import TUNED
from finetune_api.tasks import kinds_of
from finetune_trainer.evaluate.comparisons import Outcome, compare_outcomes, score_of
from finetune_trainer.evaluate.label_likelihoods import rows_of
from finetune_trainer.evaluate.label_scores import (
    BINS,
    CHOOSING,
    calibration_error,
    calibration_statistics,
    chosen,
    scored_tokens,
)
from finetune_trainer.evaluate.scores import Answers, text_metrics
from finetune_trainer.evaluate.table import Answered, joined
from finetune_trainer.storage.runfiles import LabelScores

END = 9
LABELS = ["no", "of course"]
EACH = LabelScores(labels=LABELS, tokens=[1, 3], values=[[-2.0, -3.0], [-1.0, -9.0], [-4.0, -3.0]])


def test_each_rule_divides_by_its_length() -> None:
    assert chosen(EACH, "LabelAccuracy") == ["no", "no", "of course"]
    assert chosen(EACH, "LabelAccuracyPerToken") == ["of course", "no", "of course"]
    # -2 / 2 against -3 / 9, -1 / 2 against -9 / 9.
    assert chosen(EACH, "LabelAccuracyPerCharacter") == ["of course", "no", "of course"]


def test_metrics_of_label_scores_need_labels_and_scores() -> None:
    wanted = ["no", "no", "of course"]
    answers = Answers(["x"] * 3, wanted, wanted, label_scores=EACH)
    found = text_metrics(answers, [*CHOOSING, "CalibrationError", "Accuracy"])
    assert found["LabelAccuracy"] == 1.0
    assert found["LabelAccuracyPerToken"] == pytest.approx(2 / 3)
    assert found["Accuracy"] == 0.0
    assert 0 < found["CalibrationError"] < 1
    assert text_metrics(Answers(["x"] * 3, wanted, wanted), CHOOSING) == {}
    assert text_metrics(Answers(["x"] * 3, wanted, None, label_scores=EACH), CHOOSING) == {}


def test_a_diverged_model_chooses_something() -> None:
    broken = LabelScores(
        labels=LABELS, tokens=[1, 1], values=[[math.nan, -3.0], [-math.inf, -math.inf]]
    )
    assert chosen(broken, "LabelAccuracy") == ["of course", "no"]
    assert math.isfinite(calibration_error(_sums(broken, ["no", "no"])))


def _sums(found: LabelScores, wanted: list[str]) -> list[float]:
    sums: list[float] = np.sum(calibration_statistics(found, wanted), axis=0).tolist()
    return sums


@given(st.lists(st.tuples(st.floats(0.5, 1), st.booleans()), min_size=1, max_size=60))
def test_calibration_error_is_that_of_guo(drawn: list[tuple[float, bool]]) -> None:
    """Of two labels, by a loop over the bins as in the paper's equation 3."""
    values = [[math.log(p), math.log(max(1 - p, 1e-12))] for p, _ in drawn]
    found = LabelScores(labels=["a", "b"], tokens=[1, 1], values=values)
    wanted = ["a" if right else "b" for _, right in drawn]
    error = 0.0
    confidences = [max(np.exp(v) / np.exp(v).sum()) for v in values]
    for m in range(1, BINS + 1):
        inside = [
            (c, right) for c, (_, right) in zip(confidences, drawn, strict=True)
            if (m - 1) / BINS < c <= m / BINS
        ]  # fmt: skip
        if inside:
            mean, share = (sum(column) / len(inside) for column in zip(*inside, strict=True))
            error += len(inside) / len(drawn) * abs(share - mean)
    assert calibration_error(_sums(found, wanted)) == pytest.approx(error, abs=1e-9)


def test_the_end_token_counts_only_where_a_label_begins_another() -> None:
    apart = {"ham": [4, 5, END], "spam": [6, END]}
    assert scored_tokens(apart, [END]) == [(4, 5), (6,)]
    nested = {"1": [3, END], "10": [3, 4, END], "2": [5, END]}
    assert scored_tokens(nested, [END]) == [(3, END), (3, 4, END), (5, END)]
    assert scored_tokens({"a": [3], "b": [4]}, [END]) == [(3,), (4,)]


@pytest.mark.parametrize(
    ("labels", "rows"),
    [
        ([(1,), (2,)], []),
        ([(1, 2), (1, 3)], [(1,)]),
        ([(1, 2, 3), (1, 4), (5,)], [(1, 2)]),
        ([(1, 2, 3), (2, 2)], [(2,), (1, 2)]),
    ],
)
def test_labels_share_rows(labels: list[tuple[int, ...]], rows: list[tuple[int, ...]]) -> None:
    assert rows_of(labels) == rows


def outcome(seed: int, gap: float) -> Outcome:
    """What a model did that prefers the right of two labels by ``gap`` nats in the mean."""
    random = np.random.default_rng(seed)
    wanted = ["a", "b"] * 150
    lead = random.normal(gap, 1, len(wanted))
    values = [[x, 0.0] if label == "a" else [0.0, x] for x, label in zip(lead, wanted, strict=True)]
    scores = LabelScores(labels=["a", "b"], tokens=[1, 1], values=values)
    answers = Answers(["?"] * len(wanted), wanted, wanted, label_scores=scores)
    return Outcome(np.zeros(0), np.zeros(0), answers)


def test_models_are_compared_by_their_choices_and_their_calibration() -> None:
    old, new = outcome(1, 0.2), outcome(2, 2.0)
    found = compare_outcomes(old, new, kinds_of(*CHOOSING, "CalibrationError"), 2.0)
    assert {found[m].test for m in CHOOSING} == {"McNemar"}
    assert {found[m].verdict for m in CHOOSING} == {"Better"}
    error = found["CalibrationError"]
    assert error.test == "PairedBootstrap" and error.low < error.effect < error.high
    score = score_of("CalibrationError", new)
    assert score is not None
    value = text_metrics(new.answers, ["CalibrationError"])["CalibrationError"]
    assert score(np.ones((1, 300)))[0] == pytest.approx(value)


def test_samples_are_chosen_and_draws_joined() -> None:
    row = Answered(TUNED, [0, 4, 7], ["x", "y", "z"], tokens=[1, 1, 1], label_scores=EACH)
    some = row.of([7, 0])
    assert some.answers == ["z", "x"] and some.label_scores is not None
    assert some.label_scores.values == [EACH.values[2], EACH.values[0]]
    both = joined([EACH, some.label_scores])
    assert both is not None and len(both.values) == 5
    other = EACH.model_copy(update={"labels": ["no", "yes"]})
    assert joined([EACH, None]) is joined([EACH, other]) is joined([None]) is None
