"""The table of results: rows, draws, intervals, Holm, and what it recommends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from finetune_api.evaluation_results import AS_IS, TUNED, Row, RowModel, SetTable
from finetune_api.tasks import kinds_of
from finetune_trainer.evaluate.paired import estimate, holm
from finetune_trainer.evaluate.recommendation import recommend
from finetune_trainer.evaluate.table import Answered, RowOutcome, adjusted, rows_of, table_of
from finetune_trainer.evaluate.weighted_scores import Groups, Ratio
from finetune_trainer.prepared.dataset import Reference

SAMPLES = 200
REFERENCES = [Reference(np.zeros(1, np.int32), "", "yes", "yes") for _ in range(SAMPLES)]


def row(name: str, right: float, samples: int = SAMPLES, seed: int = 0) -> Answered:
    """A row that answers a share of the samples rightly."""
    random = np.random.default_rng(seed)
    answers = ["yes" if random.random() < right else "no" for _ in range(samples)]
    return Answered(named(name), range(samples), answers, tokens=[2] * samples)


def named(name: str) -> Row:
    model, _, prompt = name.partition(" ")
    return Row(model=cast("RowModel", model), prompt=prompt or AS_IS)


def rows(*answered: Answered, groups: Groups | None = None) -> list[RowOutcome]:
    return rows_of(answered, REFERENCES, np.arange(SAMPLES) if groups is None else groups)


def table(made: Sequence[RowOutcome]) -> SetTable:
    return table_of("set", made, TUNED, kinds_of("Accuracy"), 2.0)


def test_draws_are_one_row_with_their_spread() -> None:
    made = rows(
        row("Base", 0.2), replace(row("Base 4-shot", 0.5, 80, 1), measured_by="job 1-first"),
        replace(row("Base 4-shot", 0.7, 80, 2), measured_by="job 1-first"),
        row("Tuned", 0.9, seed=3),
    )  # fmt: skip
    found = table(made)
    assert [(r.row, r.samples, r.draws) for r in found.rows] == [
        ("Base", 200, 1), ("Base 4-shot", 80, 2), ("Tuned", 200, 1)]  # fmt: skip
    assert [r.measured_by for r in found.rows] == [None, "job 1-first", None]
    few = found.rows[1]
    value = few.metrics["Accuracy"]
    assert value.lowest is not None and value.highest is not None and value.low is not None
    assert value.value == pytest.approx((value.lowest + value.highest) / 2)
    assert value.low < value.value < (value.high or 0)
    # The tuned model is compared over the row's own samples.
    right = [a == "yes" for a in made[2].draws[0].answers[:80]]
    assert few.comparisons["Accuracy"].effect == pytest.approx(np.mean(right) - value.value)
    assert few.comparisons["Accuracy"].test == "SignFlip"
    assert found.rows[0].comparisons["Accuracy"].test == "McNemar"
    assert not found.rows[2].comparisons
    assert few.tokens_per_answer == 2


def by_group(name: str, right: float, groups: Groups, seed: int) -> Answered:
    """A row whose answers to the samples of a group are all right or all wrong."""
    knows = np.random.default_rng(seed).random(int(groups.max()) + 1) < right
    return Answered(named(name), range(SAMPLES), ["yes" if knows[g] else "no" for g in groups])


def widths(found: SetTable) -> list[float]:
    """Widths of the intervals of the base model's accuracy and of the gain over it."""
    value, compared = found.rows[0].metrics["Accuracy"], found.rows[0].comparisons["Accuracy"]
    assert value.low is not None and value.high is not None
    return [value.high - value.low, compared.high - compared.low]


def test_a_group_of_samples_is_one_unit() -> None:
    groups = np.repeat(np.arange(50), 4)
    answered = by_group("Base", 0.5, groups, 1), by_group("Tuned", 0.6, groups, 2)
    alone, grouped = table(rows(*answered)), table(rows(*answered, groups=groups))
    for narrow, wide in zip(widths(alone), widths(grouped), strict=True):
        assert 1.6 < wide / narrow < 2.4, "about twice as wide: a quarter of the units"
    assert [r.groups for r in grouped.rows] == [50, 50]
    assert grouped.rows[0].samples == SAMPLES
    assert grouped.rows[0].comparisons["Accuracy"].test == "SignFlip"
    assert [r.groups for r in alone.rows] == [None, None]
    assert alone.rows[0].comparisons["Accuracy"].test == "McNemar"

    # Groups of one sample each are no groups, whatever their numbers.
    numbers = 3 + np.random.default_rng(3).permutation(SAMPLES)
    assert table(rows(*answered, groups=numbers)) == alone


def test_draws_and_groups_of_samples_are_combined() -> None:
    groups = np.repeat(np.arange(50), 4)
    drawn = by_group("Base 4-shot", 0.5, groups, 1)
    made = rows(drawn, drawn, by_group("Tuned", 0.6, groups, 2), groups=groups)
    single = rows(drawn, by_group("Tuned", 0.6, groups, 2), groups=groups)
    twice, once = table(made).rows[0], table(single).rows[0]
    assert (twice.draws, twice.groups, once.groups) == (2, 50, 50)
    # Equal draws tell nothing new.
    for end in ("low", "high"):
        for found in ("metrics", "comparisons"):
            ends = [getattr(getattr(r, found)["Accuracy"], end) for r in (twice, once)]
            assert ends[0] == pytest.approx(ends[1], abs=0.02)


def test_losses_are_compared_by_group_over_the_whole_set() -> None:
    """Losses are of all samples, answers of the first ones."""
    groups = np.repeat(np.arange(50), 4)
    random = np.random.default_rng(5)
    shared = np.repeat(random.normal(size=50), 4)
    losses = [random.normal(2.0, 0.1, SAMPLES), shared + random.normal(2.0, 0.1, SAMPLES)]
    answered = [
        Answered(named(model), range(30), ["yes"] * 30, losses=each, labels=np.ones(SAMPLES))
        for model, each in zip(("Base", "Tuned"), losses, strict=True)
    ]
    found = [
        table_of("set", rows(*answered, groups=of), TUNED, kinds_of("Loss", "Accuracy"), 2.0).rows[
            0
        ]
        for of in (groups, None)
    ]
    gains = [f.comparisons["Loss"] for f in found]
    assert gains[0].high - gains[0].low > 1.6 * (gains[1].high - gains[1].low)
    assert [f.groups for f in found] == [8, None], "of the answered samples"


def test_intervals_and_holm_equal_statsmodels() -> None:
    values = np.repeat([1.0, 0.0], [37, 63])
    found = estimate(Ratio.mean(values))
    assert found is not None
    assert found == pytest.approx((0.37, *proportion_confint(37, 100, method="wilson")))
    for ps in ([0.01, 0.04, 0.03, 0.5], [0.2], [1.0, 1.0, 0.001, 0.001]):
        assert holm(ps) == pytest.approx(multipletests(ps, method="holm")[1])
    assert holm([]) == []


def test_groups_that_are_all_right_are_one_answer_each() -> None:
    right, groups = Ratio.mean(np.ones(100)), np.repeat(np.arange(25), 4)
    found = estimate(right, groups)
    assert found is not None
    assert found == pytest.approx((1.0, *proportion_confint(25, 25, method="wilson")))


def test_few_groups_have_no_interval() -> None:
    values = np.random.default_rng(0).random(100)
    few = estimate(Ratio.mean(values), np.arange(100) % 19)
    enough = estimate(Ratio.mean(values), np.arange(100) % 20)
    assert few is not None and few == (pytest.approx(values.mean()), None, None)
    assert enough is not None and enough.low is not None


def test_every_comparison_gets_its_adjusted_p() -> None:
    made = rows(row("Base", 0.2), row("Base 1-shot", 0.85, seed=1), row("Tuned", 0.9, seed=3))
    (found,) = adjusted([table(made)])
    ps = [(c.p, c.p_adjusted) for r in found.rows for c in r.comparisons.values()]
    assert [after for _, after in ps] == pytest.approx(holm([before for before, _ in ps]))


CASES = {
    "Tune": [row("Base", 0.2), row("Base 4-shot", 0.4, seed=1), row("Tuned", 0.9, seed=2)],
    "Prompt": [row("Base", 0.2), row("Base 4-shot", 0.9, seed=1), row("Tuned", 0.9, seed=2)],
    "Neither": [row("Base", 0.97), row("Base 4-shot", 0.96, seed=1), row("Tuned", 0.975)],
    "Retrieve": [
        row("Base", 0.1), row("Base retrieval", 0.9, seed=1), row("Tuned", 0.3, seed=2),
        row("Tuned retrieval", 0.9, seed=3),
    ],
    "TuneAndRetrieve": [
        row("Base", 0.1), row("Base retrieval", 0.5, seed=1), row("Tuned", 0.5, seed=2),
        row("Tuned retrieval", 0.95, seed=3),
    ],
}  # fmt: skip


@pytest.mark.parametrize("action", CASES)
def test_the_cheapest_row_within_the_noise_is_recommended(action: str) -> None:
    made = rows(*CASES[action])
    found = recommend(made, kinds_of("Loss", "Accuracy"), 2.0)
    assert found is not None and (found.action, found.metric) == (action, "Accuracy")
    assert "Base" in found.because and "Tuned" in found.because


def test_nothing_is_recommended_without_a_comparison() -> None:
    assert recommend(rows(row("Tuned", 0.5)), kinds_of("Accuracy"), 2.0) is None
    assert recommend(rows(row("Base", 0.5), row("Tuned", 0.5)), kinds_of("Perplexity"), 2.0) is None
