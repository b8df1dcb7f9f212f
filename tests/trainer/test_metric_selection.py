"""Metrics that a set supports, and validation of the metrics that a manifest requests."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.sources import Format
from finetune_api.spec import parse_spec
from finetune_api.tasks import Metric
from finetune_trainer.evaluate.metric_selection import check_metrics, metrics_for, metrics_of
from finetune_trainer.failures import UserError
from finetune_trainer.prepared.manifest import DataSet
from finetune_trainer.prepared.split import Side

LOSS: list[Metric] = ["Loss", "Perplexity"]


@pytest.mark.parametrize(
    ("form", "requested", "found"),
    [
        ("Text", None, LOSS),
        ("Classification", None, [*LOSS, "Accuracy", "Precision", "Recall", "F1"]),
        ("PromptCompletion", None, [*LOSS, "ExactMatch", "Bleu", "Rouge"]),
        ("Retrieval", None, [*LOSS, "ExactMatch", "Bleu", "Rouge"]),
        ("Messages", ["F1", "Rouge", "Loss", "Rouge"], ["Rouge", "Loss"]),
        ("Classification", ["F1", "ExactMatch"], ["F1", "ExactMatch"]),
        ("Text", ["Bleu"], []),
        ("Classification", ["LabelAccuracy", "F1"], ["LabelAccuracy", "F1"]),
        ("Messages", ["LabelAccuracy", "Loss"], ["Loss"]),
    ],
)
def test_metrics_of_a_format(
    form: Format, requested: list[Metric] | None, found: list[Metric]
) -> None:
    assert metrics_for(form, requested) == found


@pytest.mark.parametrize("requested", [None, ["Loss", "Perplexity", "Rouge"]])
def test_the_set_of_instructions_is_measured_by_them(requested: list[Metric] | None) -> None:
    found = metrics_for("Messages", requested, built_in=True)
    assert found == [*LOSS, "InstructionFollowing"]
    assert metrics_for("Classification", None, "SequenceClassification", built_in=True)[0] == "Loss"


def entry(split: Side, form: Format, labels: int = 2) -> DataSet:
    return DataSet(
        split=split, name="a", format=form, samples=1, tokens=9, supervised=1,
        labels={str(n): [n, 0] for n in range(labels)} if form == "Classification" else {},
    )  # fmt: skip


TEXT_ONLY = [entry("train", "Text"), entry("validation", "Text"), entry("test", "Text")]
PAIRS = [entry("train", "PromptCompletion"), entry("validation", "PromptCompletion")]
LABELS = [
    entry("train", "Text"), entry("train", "Classification"),
    entry("validation", "Classification"), entry("test", "Text"),
]  # fmt: skip
MANY_LABELS = [entry("train", "Classification", 0), entry("test", "Classification", 0)]
NO_VALIDATION = [entry("train", "Text")]


def check(sets: list[DataSet], **blocks: Any) -> None:
    spec = parse_spec(
        {
            "model": {"source": "s3://bucket/model"},
            "data": {"train": [{"source": "s3://bucket/train.jsonl"}]},
            "output": {"destination": "s3://bucket/out"},
            **blocks,
        }
    )
    check_metrics(spec, sets)


def stopping(metric: str) -> dict[str, Any]:
    return {"training": {"earlyStopping": {"metric": metric}}}


@pytest.mark.parametrize(
    ("sets", "blocks"),
    [
        (TEXT_ONLY, {}),
        (NO_VALIDATION, {}),
        (TEXT_ONLY, {"evaluation": {"metrics": ["Loss"]}, **stopping("Perplexity")}),
        (LABELS, {"evaluation": {"metrics": ["Accuracy"]}, "checkpoint": {"metric": "F1"}}),
        (PAIRS, {"evaluation": {"metrics": ["Bleu"]}, **stopping("ExactMatch")}),
        (LABELS, {"evaluation": {"metrics": ["LabelAccuracy"]}, **stopping("CalibrationError")}),
    ],
)
def test_metrics_that_the_data_supports_are_accepted(
    sets: list[DataSet], blocks: dict[str, Any]
) -> None:
    check(sets, **blocks)


@pytest.mark.parametrize(
    ("sets", "blocks", "words"),
    [
        (PAIRS, {"evaluation": {"metrics": ["Loss", "F1"]}}, ["evaluation.metrics", "F1",
         "Classification", "PromptCompletion"]),
        (TEXT_ONLY, {"evaluation": {"metrics": ["Rouge"]}}, ["evaluation.metrics", "Rouge",
         "any format but Text"]),
        (PAIRS, {"checkpoint": {"metric": "Recall"}}, ["checkpoint.metric", "validation"]),
        (NO_VALIDATION, {"checkpoint": {"metric": "Rouge"}}, ["there is none"]),
        (NO_VALIDATION, stopping("Loss"), ["earlyStopping.metric", "data.split.validation"]),
        (PAIRS, {"evaluation": {"metrics": ["LabelAccuracy"]}}, ["format Classification"]),
        (MANY_LABELS, {"evaluation": {"metrics": ["CalibrationError"]}}, ["at most 64 labels"]),
        (TEXT_ONLY, stopping("Accuracy"), ["earlyStopping.metric", "Classification"]),
    ],
)  # fmt: skip
def test_metrics_without_suitable_data_are_refused(
    sets: list[DataSet], blocks: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        check(sets, **blocks)
    assert caught.value.reason == "MetricWithoutData"
    for word in words:
        assert word in caught.value.message


def test_a_set_of_too_many_labels_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    many, few = entry("test", "Classification", 0), entry("test", "Classification")
    asked: list[Metric] = ["LabelAccuracy", "F1"]
    assert (metrics_of(many, asked), metrics_of(few, asked)) == (["F1"], asked)
    assert metrics_of(few, None) == metrics_for("Classification", None)
    check([many, few], evaluation={"metrics": asked})
    assert "set a has no LabelAccuracy: more than 64 labels" in caplog.text
