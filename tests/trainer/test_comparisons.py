"""Comparisons of two models on one test set, by metric."""

from __future__ import annotations

import numpy as np
import pytest

from finetune_api.tasks import METRICS, Metric, kinds_of
from finetune_trainer.evaluate.comparisons import Outcome, compare_outcomes, score_of
from finetune_trainer.evaluate.scores import Answers, loss_metrics, text_metrics
from finetune_trainer.storage.runfiles import LabelScores

LABELS = ["yes", "no", "maybe"]


def outcome(seed: int, right: float, samples: int = 60, labelled: bool = True) -> Outcome:
    """Answers of a model that is right with a probability of ``right``, to the same questions for
    all seeds."""
    asked, random = np.random.default_rng(0), np.random.default_rng(seed)
    labels = [LABELS[i] for i in asked.integers(0, 3, samples)]
    words = [" ".join(asked.choice(["the", "cat", "sat", "on", "mats"], 8)) for _ in labels]
    references = labels if labelled else words
    said = [
        f" {r} " if random.random() < right else random.choice(["no", "the cat sat on it", "x"])
        for r in references
    ]
    # Of the labels the one that was said is likely, the others less.
    values = [[2.0 * (label == s.strip()) + random.random() for label in LABELS] for s in said]
    scores = LabelScores(labels=LABELS, tokens=[1, 1, 2], values=values)
    return Outcome(
        losses=random.random(samples) * 3,
        labels=asked.integers(1, 5, samples).astype(np.float64),
        answers=Answers(
            said, references, labels if labelled else None,
            label_scores=scores if labelled else None,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("labelled", [True, False])
def test_a_score_of_all_samples_is_the_metric(labelled: bool) -> None:
    found = outcome(1, 0.6, labelled=labelled)
    wanted = loss_metrics(found.losses.sum(), found.labels.sum())
    wanted |= text_metrics(found.answers, list(METRICS))
    everything = np.ones((1, 60))
    for metric, value in wanted.items():
        score = score_of(metric, found)
        if metric == "Perplexity":
            assert score is None, "it follows from the loss"
            continue
        assert score is not None, metric
        assert score(everything)[0] == pytest.approx(value), metric


def test_what_is_not_defined_is_not_compared() -> None:
    old, new = outcome(1, 0.5, labelled=False), outcome(2, 0.9, labelled=False)
    found = compare_outcomes(old, new, METRICS, 2.0)
    of_text = {m for m, kind in METRICS.items() if kind.source == "Text"}
    assert set(found) == {"Loss", *of_text}
    silent = Outcome(old.losses, old.labels, Answers([], [], None))
    assert set(compare_outcomes(silent, silent, METRICS, 2.0)) == {"Loss"}
    assert set(compare_outcomes(silent, new, METRICS, 2.0)) == {"Loss"}


@pytest.mark.parametrize("labelled", [True, False])
def test_a_better_model_is_better_by_every_metric_of_its_answers(labelled: bool) -> None:
    old, new = (outcome(i, right, 300, labelled) for i, right in ((1, 0.2), (2, 0.9)))
    wanted: list[Metric] = (
        ["Accuracy", "Precision", "Recall", "F1"]
        if labelled
        else ["ExactMatch", "Bleu", "ChrF", "Rouge", "TokenF1"]
    )
    found = compare_outcomes(old, new, kinds_of(*wanted), 2.0)
    assert {m: found[m].verdict for m in wanted} == dict.fromkeys(wanted, "Better")
    others = ["PairedBootstrap"] * 3 if labelled else ["PairedBootstrap"] * 2 + ["SignFlip"] * 2
    tests = ["McNemar", *others]
    assert [found[m].test for m in wanted] == tests
    back = compare_outcomes(new, old, kinds_of(*wanted), 2.0)
    assert {m: back[m].verdict for m in wanted} == dict.fromkeys(wanted, "Worse")
    for metric in wanted:
        one, other = found[metric], back[metric]
        assert one.effect == pytest.approx(-other.effect)
        assert one.low < one.effect < one.high
        assert (one.low, one.high) == pytest.approx((-other.high, -other.low))


def test_a_lower_loss_is_better() -> None:
    old, new = outcome(1, 0.5, samples=300), outcome(1, 0.5, samples=300)
    new = Outcome(new.losses - 0.5, new.labels, new.answers)
    found = compare_outcomes(old, new, kinds_of("Loss"), 2.0)["Loss"]
    assert found.effect < 0 and found.verdict == "Better"


def test_min_effect_is_in_points_of_the_metric() -> None:
    """The same answers: a gain of 2 points is ruled out, one of 0.001 is not."""
    old = outcome(1, 0.7, samples=2000)
    assert compare_outcomes(old, old, kinds_of("Accuracy"), 2.0)["Accuracy"].verdict == "NotBetter"
    tiny = compare_outcomes(old, old, kinds_of("Accuracy"), 0.001)["Accuracy"]
    assert tiny.verdict == "TooFewSamples" and (tiny.needed_samples or 0) > 2000
