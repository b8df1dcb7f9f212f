"""Gates: what passes, what is missed and by how much; how often chance passes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
from scipy.stats import binomtest

from finetune_api.evaluation_results import AS_IS, TUNED, Row, RowModel, SetTable
from finetune_api.gates import Gate
from finetune_api.tasks import METRICS, kinds_of
from finetune_trainer.evaluate.gates import against_current, results_of_gates
from finetune_trainer.evaluate.paired_tests import ALPHA
from finetune_trainer.evaluate.table import Answered, rows_of, table_of
from finetune_trainer.prepared.dataset import Reference

SAMPLES = 200
RIGHT = "yes"


def reference(count: int) -> list[Reference]:
    return [Reference(np.zeros(1, np.int32), "", RIGHT, RIGHT) for _ in range(count)]


def answers(name: str, right: Sequence[bool], losses: float | None = None) -> Answered:
    model, _, prompt = name.partition(" ")
    return Answered(
        Row(model=cast("RowModel", model), prompt=prompt or AS_IS),
        range(len(right)),
        [RIGHT if ok else "no" for ok in right],
        losses=np.full(len(right), losses) if losses is not None else np.zeros(0),
        labels=np.ones(len(right)) if losses is not None else np.zeros(0),
    )


def share(right: float, samples: int = SAMPLES) -> list[bool]:
    """The first samples are right."""
    return [i < right * samples for i in range(samples)]


def table(*rows: Answered, name: str = "support", retention: bool = False) -> SetTable:
    count = max(len(row.samples) for row in rows)
    made = rows_of(rows, reference(count), np.arange(count))
    found = table_of(name, made, TUNED, kinds_of("Loss", "Accuracy"), 2.0)
    return found.model_copy(update={"retention": retention})


SUPPORT = table(
    answers("Base", share(0.5), 2.0), answers("Base 4-shot", share(0.7)),
    answers("Base 1-shot", share(0.55)), answers("Base retrieval", share(0.6)),
    answers("Base rules", share(0.85)), answers("Tuned", share(0.8), 1.0),
    answers("Current", share(0.79)),
)  # fmt: skip
GENERAL = table(
    answers("Base", share(0.6), 2.0), answers("Tuned", share(0.5), 2.3),
    name="general", retention=True,
)  # fmt: skip


def gate(**fields: Any) -> Gate:
    return Gate.model_validate({"metric": "Accuracy", **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"operator": "AtLeast"}, "need a value"),
        ({"operator": "AtMost", "value": "1", "row": "Base"}, "remove row"),
        ({"metric": "Perplexity", "operator": "BetterThan"}, "use Loss"),
        ({"metric": "Loss", "operator": "BetterThan", "row": "FewShot"}, "metric of answers"),
    ],
)
def test_a_gate_that_cannot_pass_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        gate(**fields)


@pytest.mark.parametrize(
    ("fields", "passed", "because"),
    [
        ({"operator": "AtLeast", "value": "0.8"}, True, "80.0 %, at least 80.0 % wanted"),
        ({"operator": "AtLeast", "value": "0.85"}, False, "missed by 5.0 %"),
        ({"metric": "Loss", "operator": "AtMost", "value": "1.5"}, True, "1, at most 1.5 wanted"),
        ({"metric": "Loss", "operator": "AtMost", "value": "0.5"}, False, "missed by 0.5"),
        ({"operator": "BetterThan"}, True, "against Base +30.0 %"),
        ({"operator": "BetterThan", "value": "0.2"}, True, "against Base +30.0 %"),
        ({"operator": "BetterThan", "value": "0.28"}, False, "not significantly better by more"),
        ({"operator": "BetterThan", "row": "FewShot"}, True, "against Base 4-shot +10.0 %"),
        ({"operator": "BetterThan", "row": "Retrieval"}, True, "against Base retrieval +20.0 %"),
        ({"operator": "BetterThan", "row": "Prompt"}, False, "significantly worse"),
        ({"operator": "BetterThan", "row": "Current"}, False, "not significantly better"),
        ({"operator": "WorsensAtMost", "row": "Current", "value": "0.03"}, True, "+1.0 %"),
        ({"operator": "WorsensAtMost", "row": "Prompt", "value": "0.03"}, False, "not ruled out"),
        ({"metric": "Loss", "operator": "BetterThan"}, True, "against Base -1"),
        ({"metric": "Loss", "operator": "WorsensAtMost", "value": "0.1"}, True, "-1"),
        ({"dataSet": "general", "operator": "WorsensAtMost", "value": "0.05"}, False, "-10.0 %"),
        ({"dataSet": "general", "metric": "Loss", "operator": "WorsensAtMost", "value": "0.2"},
         False, "a loss of more than 0.2 is not ruled out"),
        ({"dataSet": "general", "metric": "Loss", "operator": "WorsensAtMost", "value": "0.4"},
         True, "+0.3"),
    ],
)  # fmt: skip
def test_a_gate_says_by_how_much(fields: dict[str, Any], passed: bool, because: str) -> None:
    (found,) = results_of_gates([gate(**fields)], [SUPPORT, GENERAL], METRICS, in_use=True)
    assert (found.passed, because in found.because) == (passed, True), found.because
    assert found.data_set == fields.get("dataSet", "support")


def test_a_gate_without_a_set_is_about_every_test_set() -> None:
    other = SUPPORT.model_copy(update={"name": "other"})
    found = results_of_gates(
        [gate(operator="BetterThan")], [SUPPORT, other, GENERAL], METRICS, in_use=False
    )
    assert [each.data_set for each in found] == ["support", "other"]


ALONE = SUPPORT.model_copy(update={"rows": SUPPORT.rows[:-1]})


def test_without_a_current_model_its_gate_passes() -> None:
    wanted = gate(operator="BetterThan", row="Current")
    (found,) = results_of_gates([wanted], [ALONE], METRICS, in_use=False)
    assert (found.passed, found.because) == (True, "there is no current model yet")
    # There is one, but it was not measured on these samples.
    (found,) = results_of_gates([wanted], [ALONE], METRICS, in_use=True)
    assert not found.passed and "was not measured on these samples" in found.because


def test_a_gate_without_its_set_is_missed() -> None:
    (found,) = results_of_gates([gate(operator="BetterThan")], [GENERAL], METRICS, in_use=False)
    assert (found.passed, found.because) == (False, "the set was not measured")


def test_few_samples_decide_nothing() -> None:
    few = table(
        answers("Base", share(0, 10), 2.0), answers("Tuned", share(1, 10), 1.1),
        answers("Current", share(1, 10), 1.1),
    )  # fmt: skip
    wanted = gate(metric="Loss", operator="BetterThan")
    (found,) = results_of_gates([wanted], [few], METRICS, in_use=True)
    assert not found.passed and "10 samples are too few" in found.because
    only_loss = [
        row.model_copy(update={"metrics": {"Loss": row.metrics["Loss"]}}) for row in few.rows
    ]
    passed, because = against_current(
        [few.model_copy(update={"rows": only_loss})], METRICS, 500.0, in_use=True
    )
    assert not passed and "10 samples are too few" in because


def test_a_loss_is_compared_over_the_samples_that_both_have() -> None:
    """All answers are known to both, but only five losses."""
    current = answers("Current", share(0.8), 1.1)
    current = replace(current, labels=np.where(np.arange(SAMPLES) < 5, 1.0, 0.0))
    found = table(answers("Base", share(0.5), 2.0), answers("Tuned", share(0.8), 1.1), current)
    wanted = gate(metric="Loss", operator="WorsensAtMost", value="0.5", row="Current")
    (result,) = results_of_gates([wanted], [found], METRICS, in_use=True)
    assert not result.passed and "5 samples are too few" in result.because
    assert against_current([found], METRICS, 9.0, in_use=True)[0], "by Accuracy, over all of them"


def test_the_current_model_is_replaced_by_what_is_not_worse() -> None:
    assert against_current([SUPPORT, GENERAL], METRICS, 3.0, in_use=True)[0]
    passed, because = against_current([SUPPORT], METRICS, 0.5, in_use=True)
    assert not passed and "worse by more than 0.5 % is possible" in because
    passed, because = against_current([ALONE], METRICS, 3.0, in_use=True)
    assert not passed and "was not measured on these samples" in because
    assert against_current([ALONE], METRICS, 3.0, in_use=False)[0]
    assert not against_current([GENERAL], METRICS, 3.0, in_use=False)[0], "there is no test set"


def test_a_model_without_finite_metrics_is_never_used() -> None:
    lost = table(answers("Base", share(0.5), 2.0), answers("Tuned", [], math.nan))
    passed, because = against_current([lost], METRICS, 3.0, in_use=False)
    assert not passed and "no metric has a finite value" in because


def passing(wanted: Gate, samples: int, gain: float, rounds: int = 1000) -> int:
    """How many simulated runs pass: a sixth of the answers differ by chance, with 60 % right."""
    random = np.random.default_rng(7)
    passed = 0
    for _ in range(rounds):
        base = random.random(samples) < 0.6
        anew = random.random(samples) < 0.6 + 6 * gain
        tuned = np.where(random.random(samples) < 1 / 6, anew, base)
        found = table(answers("Base", base.tolist()), answers("Tuned", tuned.tolist()))
        passed += results_of_gates([wanted], [found], METRICS, in_use=False)[0].passed
    return passed


def test_chance_passes_no_more_often_than_its_level() -> None:
    """1,000 runs whose tuned model is as good as the base model (A/A)."""
    passed = passing(gate(operator="BetterThan"), 300, 0.0)
    assert binomtest(passed, 1000, ALPHA / 2, alternative="greater").pvalue > 0.01, passed


def test_a_gain_of_the_planned_size_passes() -> None:
    """A gain of 5 points, with as many samples as a first look said that it needs."""
    random = np.random.default_rng(1)
    base = random.random(400) < 0.6
    tuned = np.where(random.random(400) < 1 / 6, random.random(400) < 0.6, base)
    rows = rows_of([answers("Base", base.tolist()), answers("Tuned", tuned.tolist())],
                   reference(400), np.arange(400))  # fmt: skip
    first = (
        table_of("support", rows, TUNED, kinds_of("Accuracy"), 5.0).rows[0].comparisons["Accuracy"]
    )
    planned = int(400 * (first.detectable / 0.05) ** 2)
    assert planned < 600
    assert passing(gate(operator="BetterThan"), planned, 0.05, 200) >= 0.8 * 200


def test_a_worse_model_rarely_replaces_the_current_one() -> None:
    """Worse by exactly the margin."""
    random = np.random.default_rng(3)
    passed = 0
    for _ in range(200):
        current = random.random(400) < 0.8
        tuned = current & (random.random(400) < 0.76 / 0.8)
        found = table(
            answers("Base", share(0.5, 400)), answers("Tuned", tuned.tolist()),
            answers("Current", current.tolist()),
        )  # fmt: skip
        passed += against_current([found], METRICS, 4.0, in_use=True)[0]
    assert binomtest(passed, 200, ALPHA / 2, alternative="greater").pvalue > 0.01, passed
