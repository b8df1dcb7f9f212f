"""Paired comparisons: against scipy, statsmodels and scikit-learn, and in simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, permutation_test, ttest_rel
from sklearn.metrics import precision_recall_fscore_support

from finetune_trainer.evaluate import paired
from finetune_trainer.evaluate.paired import (
    FEWEST_GROUPS,
    MANY_GROUPS,
    Scale,
    compare,
    estimate,
    verdict,
)
from finetune_trainer.evaluate.paired_tests import ALPHA, Discordance
from finetune_trainer.evaluate.weighted_scores import MacroScore, Ratio, Score

SHARE = Scale(higher_is_better=True, min_effect=0.02)


def answers(
    random: np.random.Generator, samples: int, old: float, new: float
) -> tuple[Ratio, Ratio]:
    """Right and wrong answers of two models that agree where both know or guess alike."""
    shared = random.random(samples)
    own = random.random((2, samples))
    mixed = [np.where(random.random(samples) < 0.5, shared, own[i]) for i in range(2)]
    return Ratio.mean(mixed[0] < old), Ratio.mean(mixed[1] < new)


# --- equality with packages ----------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
@settings(max_examples=50, deadline=None)
def test_mcnemar_equals_statsmodels(pairs: list[tuple[bool, bool]]) -> None:
    from statsmodels.stats.contingency_tables import mcnemar

    old, new = (np.array(side, np.float64) for side in zip(*pairs, strict=True))
    found = Discordance.of(old, new)
    table = [[found.both, found.only_new], [found.only_old, found.neither]]
    assert found.p == pytest.approx(min(1.0, mcnemar(table, exact=True).pvalue))


def test_sign_flip_equals_scipy_on_few_groups() -> None:
    """All sign flips of 10 groups are tried, so p is exact."""
    random = np.random.default_rng(1)
    groups = np.repeat(np.arange(10), 3)
    old, new = random.random(30), random.random(30) + 0.2
    found = compare(Ratio.mean(old), Ratio.mean(new), SHARE, groups)
    sums = [values.reshape(10, 3).sum(1) for values in (new, old)]
    exact = permutation_test(
        sums, lambda x, y: (x - y).mean(), permutation_type="samples", n_resamples=np.inf
    )
    assert found.test == "SignFlip"
    assert found.p == pytest.approx(exact.pvalue)


def test_a_t_test_of_many_groups_equals_scipy_and_the_bootstrap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = np.random.default_rng(2)
    old = random.random(400)
    sides = Ratio.mean(old), Ratio.mean(old + random.normal(0.01, 0.1, 400))
    resampled = compare(*sides, SHARE)
    monkeypatch.setattr(paired, "MANY_GROUPS", 399)
    found = compare(*sides, SHARE)
    assert (resampled.test, found.test) == ("SignFlip", "PairedT")
    assert found.p == pytest.approx(ttest_rel(sides[1].sums, sides[0].sums).pvalue)
    assert (found.low, found.high) == pytest.approx((resampled.low, resampled.high), abs=0.002)
    assert found.detectable == pytest.approx(resampled.detectable, rel=0.1)
    tokens = random.integers(1, 9, 400) * 1.0
    sides = Ratio(sides[0].sums * tokens, tokens), Ratio(sides[1].sums * tokens, tokens)
    found = compare(*sides, SHARE)
    monkeypatch.setattr(paired, "MANY_GROUPS", 400)
    resampled = compare(*sides, SHARE)
    assert found.effect == pytest.approx(resampled.effect)
    assert (found.low, found.high) == pytest.approx((resampled.low, resampled.high), abs=0.002)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_macro_scores_equal_scikit_learn(seed: int) -> None:
    random = np.random.default_rng(seed)
    wanted, said = random.integers(0, 4, 40), random.integers(-1, 4, 40)
    occurs = sorted(set(wanted.tolist()))
    theirs = precision_recall_fscore_support(
        wanted, said, labels=occurs, average="macro", zero_division=0.0
    )
    for number, metric in enumerate(("Precision", "Recall", "F1")):
        score = MacroScore(wanted, said, 4, metric)
        assert score(np.ones((1, 40)))[0] == pytest.approx(theirs[number]), metric
        # A sample that counts twice is two samples.
        twice = score(np.array([[2.0] * 20 + [0.0] * 20]))[0]
        half = precision_recall_fscore_support(
            wanted[:20], said[:20], labels=sorted(set(wanted[:20].tolist())), average="macro",
            zero_division=0.0,
        )  # fmt: skip
        assert twice == pytest.approx(half[number]), metric


def test_loss_is_weighted_by_tokens() -> None:
    sums, counts = np.array([2.0, 30.0]), np.array([1.0, 10.0])
    assert Ratio(sums, counts)(np.ones((1, 2)))[0] == pytest.approx(32 / 11)


# --- verdicts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("effect", "interval", "p", "expected"),
    [
        (0.05, (0.01, 0.09), 0.01, "Better"),
        (0.01, (-0.03, 0.05), 0.6, "TooFewSamples"),
        (0.00, (-0.01, 0.01), 0.9, "NotBetter"),
        (0.01, (0.005, 0.015), 0.001, "NotBetter"),
        (-0.05, (-0.09, -0.01), 0.01, "Worse"),
        (-0.005, (-0.008, -0.002), 0.01, "Worse"),
        (-0.05, (-0.12, 0.02), 0.1, "TooFewSamples"),
    ],
)
def test_verdict(effect: float, interval: tuple[float, float], p: float, expected: str) -> None:
    assert verdict(effect, interval, p, SHARE) == expected
    # The same of a metric that is better when lower.
    flipped = (-interval[1], -interval[0])
    lower = Scale(higher_is_better=False, min_effect=0.02)
    assert verdict(-effect, flipped, p, lower) == expected


def test_same_answers_of_few_samples_decide_nothing_and_of_many_are_not_better() -> None:
    few, many = (Ratio.mean(np.ones(n)) for n in (8, 4000))
    found = compare(few, few, SHARE)
    assert (found.verdict, found.p, found.effect) == ("TooFewSamples", 1.0, 0.0)
    assert found.needed_samples is not None and found.needed_samples > 8
    assert compare(many, many, SHARE).verdict == "NotBetter"


def test_few_groups_decide_nothing() -> None:
    groups = np.repeat(np.arange(FEWEST_GROUPS - 1), 50)
    old, new = Ratio.mean(np.zeros(len(groups))), Ratio.mean(np.ones(len(groups)))
    found = compare(old, new, SHARE, groups)
    assert found.verdict == "TooFewSamples" and found.effect == 1.0
    assert found.needed_samples == FEWEST_GROUPS * 50


@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_sets_of_any_size_are_compared(samples: int, groups: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    by_group = random.integers(0, groups, samples)
    wanted = random.integers(0, 2, samples)
    pairs: list[tuple[Score, Score]] = [
        (Ratio.mean(random.random(samples) < 0.5), Ratio.mean(random.random(samples) < 0.5)),
        (Ratio(random.random(samples), random.integers(0, 2, samples) * 1.0),) * 2,
        (Ratio.mean(random.random(samples)), Ratio.mean(random.random(samples))),
        (MacroScore(wanted, wanted, 2, "F1"), MacroScore(wanted, 1 - wanted, 2, "F1")),
    ]
    for old, new in pairs:
        for given_groups in (None, by_group):
            found = compare(old, new, SHARE, given_groups)
            if found is None:
                continue
            assert 0 <= found.p <= 1 and found.low <= found.high
            assert np.isfinite([found.effect, found.low, found.high, found.detectable]).all()


def test_an_empty_set_and_an_undefined_value_are_not_compared() -> None:
    empty, undefined = Ratio.mean([]), Ratio.mean([float("nan")] * 3)
    for score in (empty, undefined):
        assert compare(score, score, SHARE) is None
    with pytest.raises(ValueError, match="3 and 0 samples"):
        compare(undefined, empty, SHARE)


# --- in simulation -------------------------------------------------------------------------------


def promoted_by_chance(verdicts: list[str], level: float) -> bool:
    """Whether more runs than ``level`` are Better, by a binomial test at 1 %."""
    count = verdicts.count("Better")
    return binomtest(count, len(verdicts), level, alternative="greater").pvalue < 0.01


def test_equal_models_are_promoted_no_more_often_than_by_chance() -> None:
    random, found = np.random.default_rng(7), []
    for _ in range(1000):
        old, new = answers(random, 300, 0.7, 0.7)
        found.append(compare(old, new, SHARE).verdict)
    assert not promoted_by_chance(found, ALPHA)


@pytest.mark.parametrize("metric", ["mean", "grouped", "f1"])
def test_equal_models_by_other_metrics(metric: str) -> None:
    random, found = np.random.default_rng(8), list[str]()
    groups = np.repeat(np.arange(40), 3)
    for _ in range(100):
        if metric == "f1":
            wanted = random.integers(0, 3, 120)
            sides = [np.where(random.random(120) < 0.7, wanted, random.integers(0, 3, 120))
                     for _ in range(2)]  # fmt: skip
            old, new = (MacroScore(wanted, said, 3, "F1") for said in sides)
            found.append(compare(old, new, SHARE).verdict)
            continue
        shared = np.repeat(random.normal(size=(2, 40)), 3, axis=1) if metric == "grouped" else 0.0
        old, new = map(Ratio.mean, random.normal(size=(2, 120)) + shared)
        found.append(compare(old, new, SHARE, groups if metric == "grouped" else None).verdict)
    assert not promoted_by_chance(found, ALPHA)


def test_a_group_is_flipped_as_one_so_that_chance_is_not_called_a_difference() -> None:
    """Right and wrong answers that are equal within a group: each group is one unit of evidence."""
    random, groups = np.random.default_rng(11), np.repeat(np.arange(40), 5)
    by_group, by_sample = 0, 0
    for _ in range(300):
        old, new = (Ratio.mean((random.random(40) < 0.6)[groups]) for _ in range(2))
        grouped, alone = compare(old, new, SHARE, groups), compare(old, new, SHARE)
        assert (grouped.test, alone.test) == ("SignFlip", "McNemar")
        by_group += grouped.p < ALPHA
        by_sample += alone.p < ALPHA
    assert binomtest(by_group, 300, ALPHA, alternative="greater").pvalue >= 0.01
    assert binomtest(by_sample, 300, ALPHA, alternative="greater").pvalue < 1e-6


def test_equal_answers_of_few_groups_decide_nothing_and_of_many_are_not_better() -> None:
    found = []
    for groups in (25, 400):
        same = Ratio.mean(np.ones(4 * groups))
        found.append(compare(same, same, SHARE, np.repeat(np.arange(groups), 4)))
    assert [f.verdict for f in found] == ["TooFewSamples", "NotBetter"]
    assert all(f.low < 0 < f.high and f.p == 1 for f in found)


def test_answers_that_are_all_right_are_no_certainty() -> None:
    """Of metrics that are resampled, where all resamples are equal."""

    def all_right(samples: int) -> MacroScore:
        labels = np.arange(samples) % 2
        return MacroScore(labels, labels, labels=2, metric="F1")

    scale = Scale(higher_is_better=True, min_effect=0.02, span=1.0)
    found = [compare(all_right(n), all_right(n), scale) for n in (25, 400)]
    assert [f.verdict for f in found] == ["TooFewSamples", "NotBetter"]
    assert all(f.low == -f.high < 0 and f.p == 1 for f in found)
    known = [estimate(all_right(n), span=1.0) for n in (25, 400)]
    assert [(e.value, e.high) for e in known] == [(1.0, 1.0)] * 2
    assert 0.8 < known[0].low < 0.9 < known[1].low < 1
    wrong = MacroScore(np.arange(25) % 2, np.full(25, -1), labels=2, metric="F1")
    gained = compare(wrong, all_right(25), scale)
    assert (gained.verdict, gained.effect, gained.high) == ("Better", 1.0, 1.0)
    assert 0.8 < gained.low < 0.9
    # In many groups too, which are tested by t.
    groups = np.arange(2 * (MANY_GROUPS + 1)) // 2
    many = compare(*(Ratio.mean(np.full(len(groups), x)) for x in (0.0, 1.0)), scale, groups)
    assert (many.test, many.verdict) == ("PairedT", "Better") and many.low < many.high
    # The interval of right and wrong answers is that of proportions.
    shares = compare(Ratio.mean(np.zeros(25)), Ratio.mean(np.ones(25)), scale)
    assert (shares.test, shares.high) == ("McNemar", 1.0)
    assert shares.low == Discordance.of(np.zeros(25), np.ones(25)).interval[0] < 0.9


def test_a_gain_is_found_at_its_planned_size() -> None:
    """The detectable effect of a small set gives the size of a larger one that finds it."""
    random = np.random.default_rng(9)
    scale = Scale(higher_is_better=True, min_effect=0.05)
    pilot = compare(*answers(random, 200, 0.70, 0.72), scale)
    assert pilot.verdict == "TooFewSamples" and pilot.needed_samples
    found = [
        compare(*answers(random, pilot.needed_samples, 0.70, 0.75), scale).verdict
        for _ in range(200)
    ]
    assert found.count("Better") / len(found) >= 0.8 - 0.07  # of a pilot, which errs itself


@pytest.mark.parametrize("samples", [30, 200])
def test_newcombes_interval_covers_the_difference(samples: int) -> None:
    random, covered = np.random.default_rng(10), 0
    for _ in range(400):
        old, new = answers(random, samples, 0.8, 0.9)
        low, high = Discordance.of(old.sums, new.sums).interval
        covered += low <= 0.1 <= high
    assert covered >= 370
