"""Samples side by side: which samples the report shows, and what it says of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from measured import measured_set

from finetune_api.evaluation_results import BASE, TUNED, Row
from finetune_api.tasks import Metric
from finetune_trainer.publish.side_by_side import MOST_CHARACTERS, QUOTA, SideBySide, side_by_side

SHOT = Row(model="Base", prompt="1-shot")


def of(
    references: Sequence[str],
    answers: Mapping[Row, Sequence[str]],
    metrics: Sequence[Metric] = ("Loss", "ExactMatch"),
    digests: Sequence[str] | None = None,
    redact: bool = False,
) -> SideBySide | None:
    """What is shown of a set whose rows have answered its first samples."""
    return side_by_side(measured_set(references, answers, metrics, digests=digests), 0, redact)


def counts(found: SideBySide) -> dict[str, tuple[int, int]]:
    return {group.change: (group.count, group.shown) for group in found.groups}


def test_samples_are_told_apart_by_what_tuning_changed() -> None:
    found = of(
        ["a"] * 4, {BASE: ["x", "a", "x", "a"], SHOT: ["a", "x"], TUNED: ["a", "x", "y", "a"]}
    )
    assert found is not None and found.metric == "ExactMatch"
    assert counts(found) == {"gained": (1, 1), "lost": (1, 1), "wrong": (1, 1), "right": (1, 1)}
    assert [(s.number, s.name) for s in found.samples] == [
        (1, "wrong → right"), (2, "right → wrong"), (3, "both wrong"), (4, "both right"),
    ]  # fmt: skip
    first = found.samples[0]
    assert (first.prompt, first.reference) == ("p0", "a")
    assert [(a.row, a.text, a.value) for a in first.answers] == [
        ("Base", "x", "wrong"), ("Base 1-shot", "a", "right"), ("Tuned", "a", "right"),
    ]  # fmt: skip
    assert [a.row for a in found.samples[2].answers] == ["Base", "Tuned"]


@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 2**32)), min_size=1,
             max_size=80, unique_by=lambda each: each[2]),
    st.randoms(use_true_random=False),
)  # fmt: skip
def test_each_change_has_its_quota_in_any_order_of_the_data(
    samples: list[tuple[bool, bool, int]], random: object
) -> None:
    def shown(samples: Sequence[tuple[bool, bool, int]]) -> tuple[SideBySide, list[str]]:
        said = {True: "a", False: "b"}
        digests = [f"{number:032x}" for _, _, number in samples]
        found = of(
            ["a"] * len(samples),
            {BASE: [said[b] for b, _, _ in samples], TUNED: [said[t] for _, t, _ in samples]},
            digests=digests,
        )
        assert found is not None
        return found, [digests[s.number - 1] for s in found.samples]

    found, digests = shown(samples)
    for change, pair in {
        "gained": (False, True), "lost": (True, False), "wrong": (False, False),
        "right": (True, True),
    }.items():  # fmt: skip
        count = sum((base, tuned) == pair for base, tuned, _ in samples)
        assert counts(found)[change] == (count, min(QUOTA, count))
        assert sum(s.change == change for s in found.samples) == min(QUOTA, count)
    random.shuffle(samples)  # type: ignore[attr-defined]
    assert shown(samples)[1] == digests


def test_samples_that_more_rows_answered_come_first() -> None:
    many = QUOTA + 5
    found = of(["a"] * many, {BASE: ["x"] * many, SHOT: ["x"] * QUOTA, TUNED: ["a"] * many})
    assert found is not None and {s.number for s in found.samples} == set(range(1, QUOTA + 1))


def test_graded_answers_come_by_the_largest_change() -> None:
    found = of(
        ["one two three four"] * 4,
        {
            BASE: ["x", "one two", "one two three four", "one"],
            TUNED: ["one two three four", "one two three", "one", "one"],
        },
        ["Loss", "ExactMatch", "Rouge", "Bleu"],
    )
    assert found is not None and found.metric == "Rouge"
    assert [(s.number, s.name) for s in found.samples] == [
        (1, "better"), (2, "better"), (3, "worse"), (4, "unchanged"),
    ]  # fmt: skip
    assert [a.value for a in found.samples[2].answers] == ["100.0 %", "40.0 %"]
    assert all(a.right is None for s in found.samples for a in s.answers)
    apart = of(["a b"] * 2, {BASE: ["x", "x"], TUNED: ["a b", "x"]}, ["Rouge"])
    assert apart is not None and [s.name for s in apart.samples] == ["better", "unchanged"]


def test_without_a_metric_of_samples_answers_are_shown_alone() -> None:
    for metrics in (("Loss", "Bleu"), ("Loss",)):
        found = of(["a"] * 20, {BASE: ["x"] * 20, TUNED: ["a"] * 20}, metrics)
        assert found is not None and found.metric is None
        assert counts(found) == {"all": (20, QUOTA)}
        assert {(a.row, a.value) for s in found.samples for a in s.answers} == {
            ("Base", ""), ("Tuned", ""),
        }  # fmt: skip
    only = of(["a"], {TUNED: ["a"]})
    assert only is not None and counts(only) == {"all": (1, 1)}
    assert of(["a"], {}) is None and of(["a"], {TUNED: []}) is None


def test_of_a_model_alone_right_answers_are_told_from_wrong_ones() -> None:
    found = of(["a"] * 3, {BASE: ["a", "x", "a"], SHOT: ["a"] * 3})
    assert found is not None and counts(found) == {"wrong": (1, 1), "right": (2, 2)}
    assert {s.name for s in found.samples} == {"wrong", "right"}
    graded = of(["a b"] * 2, {BASE: ["a b", "a"]}, ["Rouge"])
    assert graded is not None and counts(graded) == {"same": (2, 2)}


@pytest.mark.parametrize("redact", [True, False])
def test_personal_data_in_answers_is_replaced_on_request(redact: bool) -> None:
    said = "write to ana@example.com"
    found = of(["a"], {BASE: [said], TUNED: [said]}, redact=redact)
    assert found is not None
    assert {a.text for a in found.samples[0].answers} == {
        "write to [EMAIL]" if redact else said
    }  # fmt: skip


def test_long_texts_are_cut_in_the_middle() -> None:
    text = "b" + "x" * 5000 + "e"
    found = of([text], {BASE: [text], TUNED: ["a"]})
    assert found is not None
    shown = found.samples[0].reference
    assert shown.startswith("bx") and shown.endswith("xe") and len(shown) < MOST_CHARACTERS + 40
    assert f"[{5002 - MOST_CHARACTERS:,} characters left out]" in shown
