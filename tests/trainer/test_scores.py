"""Metrics of generated text, on answers whose scores can be computed by hand."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest

from finetune_api.tasks import METRICS, Metric
from finetune_trainer.evaluate import scores
from finetune_trainer.evaluate.scores import (
    Answers,
    answers_to,
    better,
    loss_metrics,
    text_metrics,
)
from finetune_trainer.prepared.dataset import Reference


def test_each_metric_has_a_row_and_a_function() -> None:
    assert list(METRICS) == list(get_args(Metric))
    computed = {"Loss", "Perplexity", *scores.BY_SAMPLE, *scores._OF_SET}
    assert computed == set(METRICS)


@pytest.mark.parametrize(
    ("metric", "new", "old", "expected"),
    [
        ("Loss", 1.0, 2.0, True), ("Loss", 2.0, 1.0, False), ("Loss", 1.0, 1.0, False),
        ("Accuracy", 0.9, 0.8, True), ("Accuracy", 0.8, 0.9, False),
        ("Accuracy", math.nan, 0.1, False), ("Accuracy", 0.1, math.nan, True),
    ],
)  # fmt: skip
def test_which_value_is_better(metric: Metric, new: float, old: float, expected: bool) -> None:
    assert better(metric, new, old) is expected


def test_an_improvement_below_min_delta_is_none() -> None:
    assert not better("Loss", 0.95, 1.0, min_delta=0.1)
    assert better("Loss", 0.85, 1.0, min_delta=0.1)


def test_loss_and_perplexity() -> None:
    assert loss_metrics(6.0, 3.0) == {"Loss": 2.0, "Perplexity": pytest.approx(math.exp(2))}
    assert math.isnan(loss_metrics(0.0, 0.0)["Loss"])


def test_labels() -> None:
    """Two of four are right. A: precision 1/1, recall 1/2; B: precision 1/2, recall 1/2; an answer
    that is no label is wrong."""
    answers = Answers(
        predictions=[" A ", "B", "B", "C"], references=["A", "A", "B", "B"],
        labels=["A", "A", "B", "B"],
    )  # fmt: skip
    found = text_metrics(answers, ["Accuracy", "Precision", "Recall", "F1"])
    assert found == pytest.approx(
        {"Accuracy": 0.5, "Precision": 0.75, "Recall": 0.5, "F1": (2 / 3 + 1 / 2) / 2}
    )


def test_text() -> None:
    answers = Answers(
        predictions=["the cat sat on the mat", "yes "], references=["the cat sat on the mat", "no"],
        labels=None,
    )  # fmt: skip
    found = text_metrics(answers, ["ExactMatch", "Rouge", "Bleu", "F1"])
    assert found["ExactMatch"] == 0.5
    assert found["Rouge"] == pytest.approx(0.5)
    assert 0 < found["Bleu"] < 100
    assert "F1" not in found, "there are no labels"
    same = text_metrics(Answers(["a b c d"], ["a b c d"], None), ["Bleu", "Rouge"])
    assert same == pytest.approx({"Bleu": 100.0, "Rouge": 1.0})


@pytest.mark.parametrize(
    ("said", "wanted", "expected"),
    [
        ("The Cat.", "a cat", {"NormalizedExactMatch": 1, "TokenF1": 1, "ValidJson": 0}),
        ("cat dog", "the cat", {"NormalizedExactMatch": 0, "TokenF1": 2 / 3, "ValidJson": 0}),
        ("dog", "cat", {"NormalizedExactMatch": 0, "TokenF1": 0, "ValidJson": 0}),
        ("the", "a", {"NormalizedExactMatch": 1, "TokenF1": 1, "ValidJson": 0}),
        ("", "cat", {"NormalizedExactMatch": 0, "TokenF1": 0, "ValidJson": 0}),
        (' {"a": [1]}\n', "x", {"NormalizedExactMatch": 0, "TokenF1": 0, "ValidJson": 1}),
        ("[" * 100_000, "x", {"NormalizedExactMatch": 0, "TokenF1": 0, "ValidJson": 0}),
    ],
)
def test_normalized_text_and_json(said: str, wanted: str, expected: dict[str, float]) -> None:
    found = text_metrics(Answers([said], [wanted], None), list(expected))  # type: ignore[arg-type]
    assert found == pytest.approx(expected)


def test_instructions_are_measured_where_every_prompt_has_some() -> None:
    prompts = ["Go. Write in small letters only.", "Go. Use no commas.\n", "Hello."]
    said = ["one", "one, two", "hello"]

    def measured(count: int) -> dict[str, float]:
        references = [Reference(np.zeros(1, np.int32), p, "", None) for p in prompts[:count]]
        return text_metrics(answers_to(references, said[:count]), ["InstructionFollowing"])

    assert measured(2) == {"InstructionFollowing": 0.5}
    assert measured(3) == {}, "one prompt has none"
    assert text_metrics(Answers(said, said, None), ["InstructionFollowing"]) == {}


def test_rouge_and_chrf_equal_their_packages() -> None:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.chrf import CHRF

    said = ["the cat sat on a mat", "dogs bark", "x"]
    wanted = ["a cat sits on the mat", "the dogs barked loudly", "y"]
    found = text_metrics(Answers(said, wanted, None), ["Rouge1", "Rouge2", "Rouge", "ChrF"])
    names = {"Rouge1": "rouge1", "Rouge2": "rouge2", "Rouge": "rougeL"}
    scorer = RougeScorer(list(names.values()), use_stemmer=True)
    each = [scorer.score(r, p) for p, r in zip(said, wanted, strict=True)]
    for metric, name in names.items():
        assert found[metric] == pytest.approx(sum(s[name].fmeasure for s in each) / 3)
    assert found["ChrF"] == pytest.approx(CHRF().corpus_score(said, [wanted]).score)
