"""The table of results: rows, draws, intervals, Holm, and what it recommends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from finetune_api.evaluation_results import AS_IS, TUNED, Row, RowModel, SetTable
from finetune_trainer.evaluate.paired import Ratio, estimate, holm
from finetune_trainer.evaluate.recommendation import recommend
from finetune_trainer.evaluate.table import Answered, RowOutcome, adjusted, rows_of, table_of
from finetune_trainer.prepared.dataset import Reference

SAMPLES = 200
REFERENCES = [Reference(np.zeros(1, np.int32), "", "yes", "yes") for _ in range(SAMPLES)]


def row(name: str, right: float, samples: int = SAMPLES, seed: int = 0) -> Answered:
    """A row that answers a share of the samples rightly."""
    random = np.random.default_rng(seed)
    answers = ["yes" if random.random() < right else "no" for _ in range(samples)]
    model, _, prompt = name.partition(" ")
    asked = Row(model=cast("RowModel", model), prompt=prompt or AS_IS)
    return Answered(asked, range(samples), answers, tokens=[2] * samples)


def rows(*answered: Answered) -> list[RowOutcome]:
    return rows_of(answered, REFERENCES)


def table(made: Sequence[RowOutcome]) -> SetTable:
    return table_of("set", made, TUNED, ["Accuracy"], 2.0)


def test_draws_are_one_row_with_their_spread() -> None:
    made = rows(
        row("Base", 0.2), row("Base 4-shot", 0.5, 80, 1), row("Base 4-shot", 0.7, 80, 2),
        row("Tuned", 0.9, seed=3),
    )  # fmt: skip
    found = table(made)
    assert [(r.row, r.samples, r.draws) for r in found.rows] == [
        ("Base", 200, 1), ("Base 4-shot", 80, 2), ("Tuned", 200, 1)]  # fmt: skip
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


def test_intervals_and_holm_equal_statsmodels() -> None:
    values = np.repeat([1.0, 0.0], [37, 63])
    found = estimate(Ratio.mean(values))
    assert found is not None
    assert found == pytest.approx((0.37, *proportion_confint(37, 100, method="wilson")))
    for ps in ([0.01, 0.04, 0.03, 0.5], [0.2], [1.0, 1.0, 0.001, 0.001]):
        assert holm(ps) == pytest.approx(multipletests(ps, method="holm")[1])
    assert holm([]) == []


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
    found = recommend(made, ["Loss", "Accuracy"], 2.0)
    assert found is not None and (found.action, found.metric) == (action, "Accuracy")
    assert "Base" in found.because and "Tuned" in found.because


def test_nothing_is_recommended_without_a_comparison() -> None:
    assert recommend(rows(row("Tuned", 0.5)), ["Accuracy"], 2.0) is None
    assert recommend(rows(row("Base", 0.5), row("Tuned", 0.5)), ["Perplexity"], 2.0) is None
