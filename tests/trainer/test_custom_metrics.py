"""Metrics of the user's own: their code, their scores, and a run with them."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench import Bench
from hypothesis import given, settings
from hypothesis import strategies as st
from installed_metrics import install_metrics

from finetune_api.custom_metrics import CustomMetric, with_declared
from finetune_api.evaluation_results import TUNED, Row
from finetune_api.gates import Gate
from finetune_api.names import storage_env
from finetune_trainer.cli import main
from finetune_trainer.evaluate.custom_metrics import AnsweredSample, load_metrics, scores_of
from finetune_trainer.evaluate.gates import results_of_gates
from finetune_trainer.evaluate.metric_text import shown
from finetune_trainer.evaluate.recommendation import primary_of, recommend
from finetune_trainer.evaluate.table import Answered, rows_of, table_of
from finetune_trainer.failures import UserError
from finetune_trainer.prepared.dataset import Reference
from finetune_trainer.publish.lm_eval_export import export
from finetune_trainer.publish.measured_sets import MeasuredSet
from finetune_trainer.publish.pipeline import publish
from finetune_trainer.publish.published_results import read_all_predictions, read_results
from finetune_trainer.publish.scoring import Scorer
from finetune_trainer.storage.objects import Stores

SHARE = CustomMetric(name="Politeness")
ERRORS = CustomMetric(name="Errors", higherIsBetter=False, percent=False)


def sample(answer: str) -> AnsweredSample:
    return AnsweredSample(prompt="?", reference="yes", label=None, answer=answer, fields={})


# --- code ----------------------------------------------------------------------------------------


def test_an_installed_function_is_found_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_metrics(
        tmp_path / "site", {"Politeness": "polite", "Broken": "missing", "Number": "NUMBER"},
        """
        NUMBER = 3
        def polite(samples):
            return ["please" in sample["answer"] for sample in samples]
        """,
    )  # fmt: skip
    monkeypatch.syspath_prepend(tmp_path / "site")
    function = load_metrics([SHARE])["Politeness"]
    assert scores_of(SHARE, function, [sample("please"), sample("no")], "x") == [1.0, 0.0]
    for name, reason, words in (
        ("Kindness", "MetricNotInstalled", "available: Broken, Number, Politeness"),
        ("Broken", "MetricFailed", "own_metrics:missing of package own_metrics 1.2: AttributeErr"),
        ("Number", "MetricFailed", "is no function, but int"),
    ):
        with pytest.raises(UserError) as caught:
            load_metrics([CustomMetric(name=name)])
        assert caught.value.reason == reason
        assert words in caught.value.message and name in caught.value.message
    install_metrics(tmp_path / "more", {"Politeness": "x"}, "x = len", "others")
    monkeypatch.syspath_prepend(tmp_path / "more")
    with pytest.raises(UserError, match=r"several packages have it: others 1.2 and own_metrics"):
        load_metrics([SHARE])


@pytest.mark.parametrize(
    ("found", "metric", "words"),
    [
        ([1.0], SHARE, "returned 1 scores for 2 samples of row Tuned"),
        ([0.5, math.nan], SHARE, "returned nan for row Tuned, sample 1"),
        ([0.5, 1.5], SHARE, "a number from 0 to 1 (or declare percent: false)"),
        ([0.5, math.inf], ERRORS, "a finite number"),
        ([0.5, "1"], ERRORS, "returned '1'"),
        ([None, 0.5], ERRORS, "returned None for row Tuned, sample 0"),
    ],
)
def test_other_than_one_score_a_sample_is_refused(
    found: list[Any], metric: CustomMetric, words: str
) -> None:
    with pytest.raises(UserError) as caught:
        scores_of(metric, lambda samples: found, [sample("a"), sample("b")], "row Tuned")
    assert caught.value.reason == "MetricFailed"
    assert words in caught.value.message and metric.name in caught.value.message


def test_the_sample_that_fails_is_named() -> None:
    def fails(samples: Sequence[AnsweredSample]) -> list[float]:
        return [1 / len(each["answer"]) for each in samples]

    with pytest.raises(UserError, match=r"set s, sample 2: ZeroDivisionError"):
        scores_of(SHARE, fails, [sample("a"), sample("b"), sample(""), sample("")], "set s")
    assert scores_of(SHARE, lambda x: np.array([1, 0]), [sample("a")] * 2, "s") == [1.0, 0.0]


# --- scores --------------------------------------------------------------------------------------


def rows(old: Sequence[float], new: Sequence[float], metric: CustomMetric) -> list[Answered]:
    return [
        Answered(Row(model=model), range(len(given)), ["x"] * len(given),
                 scores={metric.name: list(given)})
        for model, given in (("Base", old), ("Tuned", new))
    ]  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=30, max_size=60),
    st.booleans(),
)
def test_scores_are_paired_and_their_direction_is_heeded(
    pairs: list[tuple[float, float]], higher: bool
) -> None:
    metric = CustomMetric(name="Errors", higherIsBetter=higher, percent=False)
    old, new = ([pair[i] for pair in pairs] for i in (0, 1))
    references = [Reference(np.zeros(0, np.int32), "?", "x", None)] * len(pairs)
    made = rows_of(rows(old, new, metric), references, np.arange(len(pairs)))
    kinds = {"Errors": metric.kind}
    table = table_of("set", made, TUNED, kinds, 0.5)
    compared = table.rows[0].comparisons["Errors"]
    difference = np.subtract(new, old)
    assert compared.effect == pytest.approx(difference.mean(), abs=1e-9)
    assert compared.low <= compared.effect <= compared.high
    gain = difference.mean() if higher else -difference.mean()
    assert compared.verdict != ("Worse" if gain > 0 else "Better")
    assert table.rows[1].metrics["Errors"].value == pytest.approx(np.mean(new), abs=1e-9)
    found = recommend(made, kinds, 0.5)
    assert found is not None and found.metric == "Errors"


def test_a_declared_metric_decides_in_its_unit() -> None:
    old, new = [4.0] * 40 + [3.0] * 40, [1.0] * 60 + [3.0] * 20
    references = [Reference(np.zeros(0, np.int32), "?", "x", None)] * 80
    kinds = with_declared([ERRORS])
    table = table_of(
        "set", rows_of(rows(old, new, ERRORS), references, np.arange(80)), TUNED,
        {"Errors": kinds["Errors"]}, 0.5,
    )  # fmt: skip
    gates = [
        Gate(metric="Errors", operator="AtMost", value="1.6"),
        Gate(metric="Errors", operator="AtMost", value="1"),
        Gate(metric="Errors", operator="BetterThan", value="1"),
        Gate(metric="Errors", operator="AtLeast", value="2"),
    ]
    results = results_of_gates(gates, [table], kinds, in_use=False)
    assert [found.passed for found in results] == [True, False, True, False]
    assert "1.5, at most 1 wanted: missed by 0.5" in results[1].because
    assert shown(SHARE.kind, 0.25) == "25.0 %" and shown(ERRORS.kind, 0.25) == "0.25"
    assert primary_of(["Loss", "Errors"]) == "Errors" and primary_of(["Errors", "Bleu"]) == "Bleu"


def test_rows_without_scores_are_scored_without_personal_data() -> None:
    seen: list[AnsweredSample] = []

    def polite(samples: Sequence[AnsweredSample]) -> list[float]:
        seen.extend(samples)
        return [0.5] * len(samples)

    known = Answered(Row(model="Tuned"), range(1), ["x"], scores={"Politeness": [1.0]})
    current = Answered(Row(model="Current"), [1], ["call ann@example.org"])
    empty = Answered(Row(model="Base"), [], [])
    references = [Reference(np.zeros(0, np.int32), f"{i}?", "yes", None) for i in range(2)]
    found = MeasuredSet(
        name="support", retention=False, metrics={"Politeness": SHARE.kind},
        answered=[known, current, empty], references=references, groups=np.arange(2),
        slices={"language": ["da", "en"]}, digests=["a", "b"],
    )  # fmt: skip
    score = Scorer([SHARE], {"Politeness": polite}, redact=True)
    scored = score(found).answered
    assert [row.scores for row in scored] == [{"Politeness": [1.0]}, {"Politeness": [0.5]}, {}]
    assert seen == [
        {"prompt": "1?", "reference": "yes", "label": None, "answer": "call [EMAIL]",
         "fields": {"language": "en"}}
    ]  # fmt: skip
    other = replace(found, metrics={})
    assert score(other) is other, "a set without the metric"


# --- a run ---------------------------------------------------------------------------------------

CODE = """
def share_of_letters(samples):
    if any("[EMAIL]" in s["answer"] for s in samples):
        raise ValueError("no")
    assert all(set(s) == {"prompt", "reference", "label", "answer", "fields"} for s in samples)
    assert all(s["label"] == s["reference"].strip() for s in samples)
    return [len(set(s["answer"]) & set(s["label"])) / len(set(s["label"])) for s in samples]

def length(samples):
    return [float(len(s["answer"])) for s in samples]

def fails_on_answers(samples):
    if any(s["answer"] != s["label"] for s in samples):
        raise ValueError("unexpected")
    return [1.0 for s in samples]
"""


@pytest.mark.slow
def test_a_run_is_measured_and_gated_by_declared_metrics(
    bench: Bench,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    site = tmp_path / "site"
    points = {"Letters": "share_of_letters", "Length": "length", "Fails": "fails_on_answers"}
    install_metrics(site, points, CODE, "metrics_of_run")
    installed = pytest.MonkeyPatch()
    installed.syspath_prepend(site)
    declared = [
        {"name": "Letters"}, {"name": "Fails"},
        {"name": "Length", "percent": False, "higherIsBetter": False},
    ]  # fmt: skip
    evaluation = {
        "metrics": ["Loss"], "baselines": {"shots": [1], "maxSamples": 8}, "maxNewTokens": 6,
        "customMetrics": declared,
        "gates": [{"metric": "Letters", "operator": "AtLeast", "value": "0"},
                  {"metric": "Length", "operator": "AtMost", "value": "0.001"}],
    }  # fmt: skip
    data = {
        "train": [{"name": "colours", "source": f"{bench.bucket}/train.jsonl"}],
        "split": {"validation": "0", "test": "0.4"}, "quality": {"deduplicate": False},
    }  # fmt: skip
    spec: dict[str, Any] = {"data": data, "training": {"epochs": None, "maxSteps": 6}}
    with pytest.raises(UserError, match="Absent needs one entry point"):
        bench.run_spec("0", **spec, evaluation={"customMetrics": [{"name": "Absent"}]})
    run_spec = bench.run_spec("1-own", **spec, evaluation=evaluation)
    bench.finish(run_spec, 1, "own")
    with pytest.raises(
        UserError, match=r"Fails failed on set colours, row Base, sample \d+: Value"
    ):
        publish(run_spec, Stores(run_spec), tmp_path / "publish")
    # What was trained stays: with corrected code the run goes on with publish.
    (site / "metrics_of_run.py").write_text(CODE.replace('raise ValueError("unexpected")', "pass"))
    installed.delitem(sys.modules, "metrics_of_run")
    summary = publish(run_spec, Stores(run_spec), tmp_path / "again")
    assert summary.held is not None and "colours Length AtMost" in summary.held
    assert summary.main_result is not None and summary.main_result.metric == "Letters"
    (scores,) = summary.scores
    assert {"Loss", "Perplexity", "Letters", "Fails", "Length"} == {*scores.tuned} == {*scores.base}

    # Published results are read where the package is not installed.
    installed.undo()
    results = read_results(bench.store, run_spec.output_uri)
    (table,) = results.evaluation.sets
    assert [row.row for row in table.rows] == ["Base", "Base 1-shot", "Tuned"]
    assert all({"Letters", "Length"} <= set(row.metrics) for row in table.rows)
    assert table.recommendation is not None and table.recommendation.metric == "Letters"
    lines = [line for line in read_all_predictions(bench.store, results) if line.scores]
    for row in ("Base", "Tuned"):
        found = next(each for each in table.rows if each.row == row).metrics["Letters"]
        given = [line.scores[row]["Letters"] for line in lines if line.scores]
        assert found.value == pytest.approx(np.mean(given)) and found.low is not None
    written = export(results, lines, tmp_path / "harness")
    figures = json.loads(written[0].read_text())["results"]["colours"]
    assert figures["letters,none"] == table.rows[0].metrics["Letters"].value
    for text in ("report.html", "README.md"):
        assert "Letters" in bench.store.get(f"{run_spec.output_uri}/{text}").decode()
    endpoint = run_spec.spec.storage.endpoint or ""
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, os.environ[storage_env(0, key)])
    uri = run_spec.output_uri
    shown_texts = {}
    for command in (["report", uri], ["compare", uri, uri]):
        code = main([*command, "--endpoint", endpoint])
        shown_texts[command[0]] = capsys.readouterr().out
        assert code == 0, shown_texts
    assert all("Letters" in text and "Length" in text for text in shown_texts.values())
