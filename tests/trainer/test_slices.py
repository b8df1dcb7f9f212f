"""Slices of test sets: values of fields, and the metrics of each value."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from bench import COLOURS, Bench
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.evaluation_results import BASE, TUNED, Row, SetTable
from finetune_api.tasks import kinds_of
from finetune_trainer.evaluate.paired import holm
from finetune_trainer.evaluate.slices import check_slices, slices_of
from finetune_trainer.evaluate.table import Answered, RowOutcome, adjusted, rows_of, table_of
from finetune_trainer.evaluate.weighted_scores import Groups
from finetune_trainer.failures import UserError
from finetune_trainer.prepare.reading.records import Record
from finetune_trainer.prepare.reducing.slices import most_frequent
from finetune_trainer.prepare.rendering.formats import SLICE_VALUE, slice_values
from finetune_trainer.prepared.dataset import Reference
from finetune_trainer.prepared.slices import MOST_VALUES, NONE, OTHER
from finetune_trainer.publish.pipeline import publish
from finetune_trainer.storage import runfiles
from finetune_trainer.storage.objects import Stores

# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("pt", "pt"),
        ("  two \n words ", "two words"),
        (3, "3"),
        (True, "true"),
        (["é", 1], '["é", 1]'),
        (None, NONE),
        (" ", NONE),
        ("write to ann@example.org", "write to [EMAIL]"),
        ("x" * 100, "x" * SLICE_VALUE + "…"),
        ("a\ud800b", "a?b"),
    ],
)
def test_a_value_is_a_short_text_without_personal_data(value: Any, text: str) -> None:
    record = Record({"field": value}, "s3://b/a.jsonl", "line 1")
    assert slice_values(record, ["field", "other"]) == (text, NONE)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(-1, 60)), max_size=300))
def test_the_most_frequent_values_of_each_set_are_told_apart(
    samples: list[tuple[int, int]],
) -> None:
    sets = [number for number, _ in samples]
    values = [NONE if value < 0 else f"v{value:02}" for _, value in samples]
    found = most_frequent(sets, values)
    assert all(b in (a, OTHER) for a, b in zip(values, found, strict=True))
    for number in set(sets):
        here = [i for i, each in enumerate(sets) if each == number]
        kept = {found[i] for i in here} - {OTHER, NONE}
        lost = {values[i] for i in here} - kept - {NONE}
        assert len(kept) <= MOST_VALUES and (not lost or len(kept) == MOST_VALUES)
        count = [values[i] for i in here].count
        assert all(count(rare) <= count(value) for rare in lost for value in kept)
        assert all(found[i] == NONE for i in here if values[i] == NONE)


def test_a_field_that_no_test_record_has_is_refused() -> None:
    check_slices(["a"], {"a": [NONE, "x"]})
    with pytest.raises(UserError) as caught:
        check_slices(["a", "langauge"], {"a": ["x"], "langauge": [NONE]})
    assert caught.value.reason == "SliceFieldMissing"
    assert "spec.evaluation.slices[1]: langauge: no test record" in caught.value.message
    with pytest.raises(UserError, match="there is no test set"):
        check_slices(["a"], {"a": []})


# --- results -------------------------------------------------------------------------------------

SAMPLES = 120
REFERENCES = [Reference(np.zeros(1, np.int32), "", "yes", "yes") for _ in range(SAMPLES)]


def outcome(row: Row, right: Sequence[bool], losses: Sequence[float] = ()) -> Answered:
    said = ["yes" if each else "no" for each in right]
    return Answered(
        row, range(len(said)), said, losses=np.array(losses), labels=np.ones(len(losses))
    )


def outcomes(*answered: Answered, groups: Groups | None = None) -> list[RowOutcome]:
    return rows_of(answered, REFERENCES, np.arange(SAMPLES) if groups is None else groups)


def test_a_loss_in_a_rare_case_is_first_though_the_mean_gains() -> None:
    language = ["da" if i % 6 == 0 else "en" for i in range(SAMPLES)]
    base = [i % 3 != 1 for i in range(SAMPLES)]
    rows = outcomes(outcome(BASE, base), outcome(TUNED, [each == "en" for each in language]))
    (worst, best) = slices_of(rows, {"language": language}, kinds_of("Accuracy"), 2.0)
    table = table_of("set", rows, TUNED, kinds_of("Accuracy"), 2.0)
    assert table.rows[0].comparisons["Accuracy"].effect > 0
    assert (worst.field, worst.value, worst.samples) == ("language", "da", 20)
    assert (best.value, best.samples, best.metric) == ("en", 100, "Accuracy")
    assert worst.comparison is not None and best.comparison is not None
    assert worst.comparison.verdict == "Worse" and worst.comparison.effect == -1
    assert worst.base["Accuracy"].value == 1 and worst.tuned["Accuracy"].value == 0

    # A slice is compared like a set of these samples alone.
    here = [i for i in range(SAMPLES) if language[i] == "en"]
    alone = rows_of(
        [outcome(BASE, [base[i] for i in here]), outcome(TUNED, [True] * len(here))],
        REFERENCES[: len(here)],
        np.arange(len(here)),
    )
    expected = table_of("set", alone, TUNED, kinds_of("Accuracy"), 2.0).rows[0]
    assert best.comparison == expected.comparisons["Accuracy"]
    assert best.base == expected.metrics


def test_losses_of_a_slice_are_its_own_and_answers_may_be_of_the_first_samples() -> None:
    """Loss is better when lower, so the worst change is the largest one."""
    field = ["a", "b", "c"] * (SAMPLES // 3)
    before = [1.0] * SAMPLES
    after = [{"a": 1.5, "b": 0.5, "c": 2.0}[value] for value in field]
    rows = outcomes(
        outcome(BASE, [True] * 3, before), outcome(TUNED, [False] * 3, after),
        groups=np.arange(SAMPLES) // 2,
    )  # fmt: skip
    found = slices_of(rows, {"field": field}, kinds_of("Loss"), 2.0)
    assert [(s.value, s.tuned["Loss"].value) for s in found] == [("c", 2), ("a", 1.5), ("b", 0.5)]
    found = slices_of(rows, {"field": ["late" if i > 2 else "early" for i in range(SAMPLES)]},
                      kinds_of("Accuracy", "Loss"), 2.0)  # fmt: skip
    assert [(s.value, s.samples, s.groups) for s in found] == [
        ("early", 3, 2), ("late", SAMPLES - 3, 59)]  # fmt: skip
    assert found[1].comparison is None and set(found[1].tuned) == {"Loss"}


def test_slices_belong_to_the_family_of_all_comparisons() -> None:
    random = np.random.default_rng(1)
    right = random.random((2, SAMPLES)) < [[0.5], [0.7]]
    rows = outcomes(outcome(BASE, list(right[0])), outcome(TUNED, list(right[1])))
    slices = slices_of(rows, {"f": [str(i % 4) for i in range(SAMPLES)]}, kinds_of("Accuracy"), 2.0)
    table = table_of("set", rows, TUNED, kinds_of("Accuracy"), 2.0)
    first = table.model_copy(update={"slices": slices})
    both = adjusted([first, SetTable(name="other", rows=table.rows)])
    compared = [
        c
        for t in both
        for c in [*t.rows[0].comparisons.values(), *(s.comparison for s in t.slices)]
        if c is not None
    ]
    assert len(compared) == 6
    assert [c.p_adjusted for c in compared] == pytest.approx(holm([c.p for c in compared]))


# --- a run ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_reports_groups_and_slices_from_data_to_report(bench: Bench) -> None:
    things = list(COLOURS)
    made = [
        {
            "text": f"{i} the {things[i % 4]} is ",
            "label": COLOURS[things[i % 4]],
            "customer": f"customer {i // 5}",
            "language": "da" if i % 5 == 0 else "en",
        }
        for i in range(240)
    ]
    text = "".join(json.dumps(record) + "\n" for record in made)
    bench.store.put(f"{bench.bucket}/grouped.jsonl", text.encode())
    data = {
        "train": [{"name": "colours", "source": f"{bench.bucket}/grouped.jsonl"}],
        "split": {"validation": "0", "test": "0.5", "groupBy": "customer"},
    }
    evaluation = {"baselines": {"shots": []}, "slices": ["language"], "maxNewTokens": 8}
    run_spec = bench.run_spec(
        "1-sliced", data=data, evaluation=evaluation, training={"epochs": None, "maxSteps": 12}
    )
    bench.finish(run_spec, 2, "sliced")
    publish(run_spec, Stores(run_spec), bench.tmp_path / "publish")

    read = bench.store.get
    (told,) = json.loads(read(f"{run_spec.output_uri}/metrics.json"))["test"]
    count = told["samples"]
    assert count % 5 == 0 and count >= 5 * 20, "whole customers are held out"
    for row in told["rows"]:
        assert (row["samples"], row["groups"]) == (count, count // 5)
    assert told["rows"][0]["comparisons"]["Loss"]["test"] == "SignFlip"
    slices = {s["value"]: s for s in told["slices"]}
    assert {value: s["samples"] for value, s in slices.items()} == {
        "da": count // 5, "en": count - count // 5}  # fmt: skip
    # One Danish sample of each customer: no groups; the English ones of a customer are a group.
    assert slices["da"].get("groups") is None and slices["en"]["groups"] == count // 5
    for metric in ("Accuracy", "Loss"):
        for model in ("base", "tuned"):
            parts = [s[model][metric]["value"] for s in (slices["da"], slices["en"])]
            whole = told[model][metric]
            assert min(parts) - 1e-6 <= whole <= max(parts) + 1e-6, (metric, model)
    for part in slices.values():
        assert part["metric"] == "Accuracy"
        assert part["comparison"]["pAdjusted"] >= part["comparison"]["p"]
    report = read(f"{run_spec.output_uri}/report.html").decode()
    assert "Slices of the test sets" in report and f"{count} in {count // 5} groups" in report
    evaluated = runfiles.read_evaluation(bench.store, run_spec.run_uri)
    assert [s.value for s in evaluated.sets[0].slices] == [s["value"] for s in told["slices"]]
