"""The matrix of a sequence of runs, from what each has published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from finetune_api.tasks import METRICS
from finetune_trainer.publish.model_comparison import Model
from finetune_trainer.publish.predictions import Prediction
from finetune_trainer.publish.row_tables import matrix_table
from finetune_trainer.publish.task_matrix import Stage, matrix

SAMPLES = 40


def stage(name: str, right: Mapping[str, int], tests: Sequence[str] = (), first: int = 0) -> Stage:
    """A model that answers the first ``right`` samples of each set rightly.

    Args:
        first: number of its first sample; later ones are other samples than those of the rest.
    """
    lines = {
        (data_set, str(number)): Prediction(
            data_set=data_set, sample=str(number), prompt="p", reference="yes", label="yes",
            answers={"Tuned": "yes" if number < count else "no"},
        )
        for data_set, count in right.items()
        for number in range(first, first + SAMPLES)
    }  # fmt: skip
    metrics = dict.fromkeys(right, ("ExactMatch", "Accuracy"))
    return Stage(Model(name, lines, metrics), frozenset(tests), tuned=name != "Base")


SEQUENCE = [
    stage("Base", {"first": 4}),
    stage("one 1-a", {"first": 36}, ["first"]),
    stage("two 1-b", {"first": 20, "second": 32}, ["second"]),
    stage("three 1-c", {"first": 28, "second": 24, "third": 40}, ["third"]),
]


def test_values_forgetting_and_backward_transfer() -> None:
    found = matrix(SEQUENCE, {"zero 1-z": "manifest.json does not exist"})
    assert found is not None
    first, second = found.columns  # the third set is known to no model before
    assert found.models == ["Base", "one 1-a", "two 1-b", "three 1-c"]
    assert (first.values, first.own) == ([0.1, 0.9, 0.5, 0.7], 1)
    assert (second.values, second.own) == ([None, None, 0.8, 0.6], 2)
    assert (first.forgetting, second.forgetting) == pytest.approx((0.2, 0.2))
    assert first.transfer is not None and first.transfer.effect == pytest.approx(-0.2)
    assert found.average_forgetting == pytest.approx(0.2)
    assert found.backward_transfer == pytest.approx(-0.2)
    shown = matrix_table(found, METRICS)
    assert shown is not None
    assert shown.sets == ["first, Accuracy", "second, Accuracy"]
    assert shown.rows[1] == ("one 1-a", ["90.0 %*", "–"])
    assert shown.rows[2] == ("two 1-b", ["50.0 %", "80.0 %*"])
    assert shown.not_read == "zero 1-z: manifest.json does not exist"
    assert shown.summary == "average forgetting +20.0 points, backward transfer -20.0 points"


def test_values_are_of_the_samples_that_all_know_and_models_with_few_of_them_do_not_count() -> None:
    half = stage("one 1-a", {"first": 40}, ["first"], first=SAMPLES // 2)
    few = stage("two 1-b", {"first": 40}, [], first=SAMPLES // 2 + 1)
    last = stage("three 1-c", {"first": 30})
    found = matrix([half, few, last], {})
    assert found is not None
    assert (found.columns[0].samples, found.columns[0].values) == (20, [1.0, None, 0.5])


@pytest.mark.parametrize(
    "stages",
    [
        [SEQUENCE[0], stage("one 1-a", {"second": 9}, ["second"])],
        [stage("one 1-a", {"third": 9}), stage("two 1-b", {"third": 9}, ["third"])],
    ],
)
def test_without_an_earlier_task_there_is_no_matrix(stages: list[Stage]) -> None:
    """The last model but one is measured as the base of the last one: that is no matrix yet."""
    assert matrix(stages, {}) is None
    assert matrix_table(None, METRICS) is None
