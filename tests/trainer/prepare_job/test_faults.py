"""Errors of the prepare stage for unusable data or specs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune_trainer.failures import DataError, UserError
from finetune_trainer.prepare.tokenizing.tokens import Tokens
from trainer.prepare_helpers import (
    ALL,
    LONG,
    Workplace,
    lines,
    pairs,
    texts,
)

# --- faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"\n\n"])
def test_an_empty_data_set_is_refused(at: Workplace, data: bytes) -> None:
    error = at.fault(data)
    assert isinstance(error, DataError) and error.reason == "EmptyDataSet"
    assert "train-0" in error.message and f"{at.root}/data/" in error.message


def test_data_without_a_remaining_training_sample_is_refused(at: Workplace) -> None:
    error = at.fault(
        lines(LONG),
        data={**ALL, "quality": {"overlength": "Drop"}},
        training={"maxLength": 16},
    )
    assert error.reason == "EmptyDataSet" and "Overlength 1" in error.message


def test_a_test_set_without_a_remaining_sample_is_refused(at: Workplace) -> None:
    held = at.put("held.jsonl", lines(LONG))
    data = {"test": [{"source": held}], "quality": {"overlength": "Drop"}}
    error = at.fault(lines(*pairs(9)), data=data, training={"maxLength": 32})
    assert error.reason == "EmptyDataSet" and "'test-0'" in error.message
    assert "all 1 records were left out (Overlength 1)" in error.message


def test_a_malformed_line_fails_the_job_with_file_line_and_text(at: Workplace) -> None:
    error = at.fault(lines(*pairs(700)), lines(*pairs(600, 700)) + b'{"prompt": "x" oops}\n')
    assert isinstance(error, DataError) and error.reason == "MalformedRecord"
    assert f"{at.root}/data/1.jsonl, line 601, column 16" in error.message
    assert "oops" in error.message


def test_a_record_without_a_required_field_fails_the_job(at: Workplace) -> None:
    error = at.fault(lines(*pairs(3), {"prompt": "x", "answer": "y"}))
    assert error.reason == "MissingField"
    assert "data/0.jsonl, line 4: field 'completion' is missing" in error.message
    assert "prompt, answer" in error.message


FAULTY = [
    b"oops\n",
    lines({"prompt": "x", "answer": "y"}, {"prompt": "x", "completion": 7}),
    lines({"prompt": "x", "completion": ""}),
]
DROP = {**ALL, "quality": {"faultyRecords": "Drop"}}


def test_faulty_records_are_dropped_and_counted_by_reason(at: Workplace) -> None:
    data = FAULTY[0] + lines(*pairs(2)) + b"\n" + FAULTY[1] + lines(*pairs(3, 2)) + FAULTY[2]
    summary, prepared = at.prepare(at.run_spec(data, data=DROP))
    assert texts(prepared, "train") == [r["prompt"] + r["completion"] for r in pairs(5)]
    counts = {"MalformedRecord": 1, "MissingField": 1, "WrongType": 1, "NothingSupervised": 1}
    assert summary.dropped == counts
    (source,) = json.loads(at.store.get(f"{summary.uri}/report.json"))["sources"]
    assert source["records"] == 9
    assert [f["reason"] for f in source["faults"]] == list(counts)
    assert "data/0.jsonl, line 5: field 'completion'" in source["faults"][1]["message"]


def test_a_record_whose_answer_has_no_tokens_is_dropped(
    at: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Tokens._encode
    monkeypatch.setattr(
        Tokens,
        "_encode",
        lambda self, texts: [
            [] if text == "\u200b" else ids
            for text, ids in zip(texts, encode(self, texts), strict=True)
        ],
    )
    faulty = {"prompt": "x", "completion": "\u200b"}
    summary, prepared = at.prepare(at.run_spec(lines(*pairs(2), faulty, *pairs(2, 2)), data=DROP))
    assert texts(prepared, "train") == [r["prompt"] + r["completion"] for r in pairs(4)]
    assert summary.dropped == {"NothingSupervised": 1}


@pytest.mark.parametrize("data", [lines(*pairs(2)) + FAULTY[0] * 3, FAULTY[0]])
def test_a_set_that_is_mostly_faulty_fails_the_job(at: Workplace, data: bytes) -> None:
    error = at.fault(data, data=DROP)
    assert isinstance(error, DataError) and error.reason == "MostRecordsFaulty"
    assert "(60%)" in error.message or "1 of 1 records (100%)" in error.message
    assert "data/0.jsonl, line " in error.message and "'oops'" in error.message


def test_half_of_a_set_may_be_faulty(at: Workplace) -> None:
    summary, _ = at.prepare(at.run_spec(lines(*pairs(2)) + FAULTY[0] * 2, data=DROP))
    assert summary.train_samples == 2 and summary.dropped == {"MalformedRecord": 2}


def test_a_record_without_the_group_field_fails_the_job(at: Workplace) -> None:
    error = at.fault(lines(*pairs(3)), data={"split": {"groupBy": "customer"}})
    assert error.reason == "MissingField" and "'customer'" in error.message


def test_a_template_that_renders_an_empty_completion_fails_the_job(at: Workplace) -> None:
    template = {"prompt": "{{ prompt }}", "completion": "{% if false %}x{% endif %}"}
    source = {"source": f"{at.root}/data/", "template": template}
    error = at.fault(lines(*pairs(3)), data={"train": [source]})
    assert error.reason == "NothingSupervised" and "line 1" in error.message


def test_a_set_name_that_equals_a_default_name_is_refused(at: Workplace) -> None:
    uri = at.put("data/0.jsonl", lines(*pairs(3)))
    error = at.fault(data={"train": [{"source": uri, "name": "train-1"}, {"source": uri}]})
    assert isinstance(error, UserError) and error.reason == "DuplicateName"


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"evaluation": {"metrics": ["Loss", "F1"]}}, "evaluation.metrics"),
        ({"checkpoint": {"metric": "Accuracy"}}, "checkpoint.metric"),
        ({"training": {"earlyStopping": {}}, "data": {"split": {"validation": "0.0001"}}},
         "training.earlyStopping.metric"),
    ],
)  # fmt: skip
def test_a_metric_without_a_suitable_set_is_refused(
    at: Workplace, spec: dict[str, Any], field: str
) -> None:
    run_spec = at.run_spec(lines(*pairs(30)), **spec)
    with pytest.raises(UserError, match=field) as caught:
        at.prepare(run_spec)
    assert caught.value.reason == "MetricWithoutData"
    assert not at.store.head(f"{run_spec.run_uri}/prepared.json")


def test_a_stage_without_steps_is_refused(at: Workplace) -> None:
    stages = [{"name": "warm", "steps": "0.01"}, {"name": "rest", "steps": "0.99"}]
    run_spec = at.run_spec(
        lines(*pairs(30)), data={**ALL, "stages": stages}, training={"maxSteps": 40}
    )
    with pytest.raises(UserError, match=r"'warm' would have no step: .*40 steps") as caught:
        at.prepare(run_spec)
    assert caught.value.reason == "StageTooShort"
    assert not at.store.head(f"{run_spec.run_uri}/prepared.json")
