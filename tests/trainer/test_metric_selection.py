"""Metrics that a set supports, and validation of the metrics that a manifest requests."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.sources import Format
from finetune_api.spec import parse_spec
from finetune_api.tasks import Metric
from finetune_trainer.evaluate.metric_selection import check_metrics, metrics_for
from finetune_trainer.failures import UserError

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


TEXT_ONLY: dict[str, list[Format]] = {"train": ["Text"], "validation": ["Text"], "test": ["Text"]}
PAIRS: dict[str, list[Format]] = {
    "train": ["PromptCompletion"], "validation": ["PromptCompletion"], "test": [],
}  # fmt: skip
LABELS: dict[str, list[Format]] = {
    "train": ["Text", "Classification"], "validation": ["Classification"], "test": ["Text"],
}  # fmt: skip
NO_VALIDATION: dict[str, list[Format]] = {"train": ["Text"], "validation": [], "test": []}


def check(formats: dict[str, list[Format]], **blocks: Any) -> None:
    spec = parse_spec(
        {
            "model": {"source": "s3://bucket/model"},
            "data": {"train": [{"source": "s3://bucket/train.jsonl"}]},
            "output": {"destination": "s3://bucket/out"},
            **blocks,
        }
    )
    check_metrics(spec, formats)


def stopping(metric: str) -> dict[str, Any]:
    return {"training": {"earlyStopping": {"metric": metric}}}


@pytest.mark.parametrize(
    ("formats", "blocks"),
    [
        (TEXT_ONLY, {}),
        (NO_VALIDATION, {}),
        (TEXT_ONLY, {"evaluation": {"metrics": ["Loss"]}, **stopping("Perplexity")}),
        (LABELS, {"evaluation": {"metrics": ["Accuracy"]}, "checkpoint": {"metric": "F1"}}),
        (PAIRS, {"evaluation": {"metrics": ["Bleu"]}, **stopping("ExactMatch")}),
    ],
)
def test_metrics_that_the_data_supports_are_accepted(
    formats: dict[str, list[Format]], blocks: dict[str, Any]
) -> None:
    check(formats, **blocks)


@pytest.mark.parametrize(
    ("formats", "blocks", "words"),
    [
        (PAIRS, {"evaluation": {"metrics": ["Loss", "F1"]}}, ["evaluation.metrics", "F1",
         "Classification", "PromptCompletion"]),
        (TEXT_ONLY, {"evaluation": {"metrics": ["Rouge"]}}, ["evaluation.metrics", "Rouge",
         "any format but Text"]),
        (PAIRS, {"checkpoint": {"metric": "Recall"}}, ["checkpoint.metric", "validation"]),
        (NO_VALIDATION, {"checkpoint": {"metric": "Rouge"}}, ["there is none"]),
        (NO_VALIDATION, stopping("Loss"), ["earlyStopping.metric", "data.split.validation"]),
        (TEXT_ONLY, stopping("Accuracy"), ["earlyStopping.metric", "Classification"]),
    ],
)  # fmt: skip
def test_metrics_without_suitable_data_are_refused(
    formats: dict[str, list[Format]], blocks: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        check(formats, **blocks)
    assert caught.value.reason == "MetricWithoutData"
    for word in words:
        assert word in caught.value.message
