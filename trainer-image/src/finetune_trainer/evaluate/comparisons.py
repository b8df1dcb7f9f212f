"""Comparisons of the tuned with the base model on one test set, one for each metric."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from finetune_api.evaluation_results import Comparison
from finetune_api.tasks import Kinds
from finetune_trainer.evaluate.label_scores import calibration_error
from finetune_trainer.evaluate.paired import Scale, compare
from finetune_trainer.evaluate.scores import (
    BY_SAMPLE,
    OF_LOSS,
    Answers,
    bleu_of,
    bleu_statistics,
    calibration_statistics,
    chrf_of,
    chrf_statistics,
)
from finetune_trainer.evaluate.weighted_scores import (
    Groups,
    Macro,
    MacroScore,
    Ratio,
    Score,
    SummedScore,
)


@dataclass(frozen=True)
class Outcome:
    """What one model did with the samples of a set."""

    losses: npt.NDArray[np.float64]
    """Loss of each sample, summed over its labels, shape [samples]."""
    labels: npt.NDArray[np.float64]
    """Number of labels of each sample, shape [samples]."""
    answers: Answers
    """Answers to samples of the set, or to none."""
    loss_groups: Groups | None = None
    """Number of the group of each sample with a loss, shape [samples]; None: each is one."""
    answer_groups: Groups | None = None
    """Number of the group of each answer, shape [answers]; None: each is one."""

    def groups_of(self, metric: str) -> Groups | None:
        """Groups of the samples of which ``score_of`` makes the metric."""
        if metric in OF_LOSS:
            return self.loss_groups
        scored = self.scored(metric)
        if self.answer_groups is None or scored is None:
            return self.answer_groups
        return self.answer_groups[scored]

    def scored(self, metric: str) -> list[int] | None:
        """Numbers of the answers with a score from outside of the trainer; None: the trainer
        computes the metric, of all answers."""
        scores = self.answers.scores.get(metric)
        return (
            None if scores is None else [n for n, score in enumerate(scores) if score is not None]
        )


def compare_outcomes(
    base: Outcome,
    tuned: Outcome,
    metrics: Kinds,
    min_points: float,
) -> dict[str, Comparison]:
    """Compare two models, or two ways to ask them, by the metrics that their outcomes allow. Both
    outcomes are of the same samples in the same groups.

    Perplexity follows from the loss, and has no comparison of its own.

    Args:
        min_points: smallest gain that matters (``evaluation.minEffect``): hundredths of a share or
            of a nat, and points of a metric from 0 to 100.
    """
    found = {}
    for metric, kind in metrics.items():
        old, new = score_of(metric, base), score_of(metric, tuned)
        if old is None or new is None or old.samples != new.samples:
            continue
        if base.scored(metric) != tuned.scored(metric):
            continue
        scale = Scale(kind.higher_is_better, min_points * kind.point, kind.span)
        compared = compare(old, new, scale, base.groups_of(metric))
        if compared is not None:
            found[metric] = compared
    return found


def score_of(metric: str, outcome: Outcome) -> Score | None:
    """A metric of an outcome as a function of sample weights; None: not defined, or it follows from
    another metric."""
    answers = outcome.answers
    if metric == "Loss":
        return Ratio(outcome.losses, outcome.labels) if len(outcome.losses) else None
    if metric in OF_LOSS or not answers.predictions or not answers.allow(metric):
        return None
    if metric in answers.scores:
        given = [score for score in answers.scores[metric] if score is not None]
        return Ratio.mean(given) if given else None
    if metric in BY_SAMPLE:
        return Ratio.mean(BY_SAMPLE[metric](answers))
    if metric in _MACRO:
        return _macro(answers, _MACRO[metric])
    statistics, of = _SUMMED[metric]
    return SummedScore(np.asarray(statistics(answers), np.float64), of)


_SUMMED: Final[
    dict[
        str,
        tuple[Callable[[Answers], Sequence[Sequence[float]]], Callable[[Sequence[float]], float]],
    ]
] = {
    "Bleu": (bleu_statistics, bleu_of),
    "ChrF": (chrf_statistics, chrf_of),
    "CalibrationError": (calibration_statistics, calibration_error),
}


_MACRO: Final[dict[str, Macro]] = {"Precision": "Precision", "Recall": "Recall", "F1": "F1"}


def _macro(answers: Answers, metric: Macro) -> MacroScore:
    labels = answers.labels or ()
    numbers = {label: number for number, label in enumerate(sorted(set(labels)))}
    return MacroScore(
        references=np.array([numbers[label] for label in labels], np.int64),
        answers=np.array([numbers.get(p.strip(), -1) for p in answers.predictions], np.int64),
        labels=len(numbers),
        metric=metric,
    )
