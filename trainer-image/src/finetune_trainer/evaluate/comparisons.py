"""Comparisons of the tuned with the base model on one test set, one for each metric."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from finetune_api.evaluation_results import Comparison
from finetune_api.tasks import METRICS, Metric
from finetune_trainer.evaluate.label_scores import calibration_error
from finetune_trainer.evaluate.paired import Scale, compare
from finetune_trainer.evaluate.scores import (
    BY_SAMPLE,
    Answers,
    bleu_of,
    bleu_statistics,
    calibration_statistics,
    chrf_of,
    chrf_statistics,
)
from finetune_trainer.evaluate.weighted_scores import Groups, MacroScore, Ratio, Score, SummedScore


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

    def groups_of(self, metric: Metric) -> Groups | None:
        """Groups of the samples of which ``score_of`` makes the metric."""
        return self.loss_groups if METRICS[metric].source == "Loss" else self.answer_groups


def compare_outcomes(
    base: Outcome,
    tuned: Outcome,
    metrics: Iterable[Metric],
    min_points: float,
) -> dict[Metric, Comparison]:
    """Compare two models, or two ways to ask them, by the metrics that their outcomes allow. Both
    outcomes are of the same samples in the same groups.

    Perplexity follows from the loss, and has no comparison of its own.

    Args:
        min_points: smallest gain that matters (``evaluation.minEffect``): hundredths of a share or
            of a nat, and points of a metric from 0 to 100.
    """
    found = {}
    for metric in metrics:
        old, new = score_of(metric, base), score_of(metric, tuned)
        if old is None or new is None or old.samples != new.samples:
            continue
        kind = METRICS[metric]
        scale = Scale(kind.higher_is_better, min_points * kind.point, kind.span)
        compared = compare(old, new, scale, base.groups_of(metric))
        if compared is not None:
            found[metric] = compared
    return found


def score_of(metric: Metric, outcome: Outcome) -> Score | None:
    """A metric of an outcome as a function of sample weights; None: not defined, or it follows from
    another metric."""
    answers = outcome.answers
    if metric == "Loss":
        return Ratio(outcome.losses, outcome.labels) if len(outcome.losses) else None
    if METRICS[metric].source == "Loss" or not answers.predictions:
        return None
    if not answers.allow(metric):
        return None
    if metric in BY_SAMPLE:
        return Ratio.mean(BY_SAMPLE[metric](answers))
    if metric == "Precision" or metric == "Recall" or metric == "F1":
        return _macro(answers, metric)
    statistics, of = _SUMMED[metric]
    return SummedScore(np.asarray(statistics(answers), np.float64), of)


_SUMMED: Final[
    dict[
        Metric,
        tuple[Callable[[Answers], Sequence[Sequence[float]]], Callable[[Sequence[float]], float]],
    ]
] = {
    "Bleu": (bleu_statistics, bleu_of),
    "ChrF": (chrf_statistics, chrf_of),
    "CalibrationError": (calibration_statistics, calibration_error),
}


def _macro(answers: Answers, metric: Literal["Precision", "Recall", "F1"]) -> MacroScore:
    labels = answers.labels or ()
    numbers = {label: number for number, label in enumerate(sorted(set(labels)))}
    return MacroScore(
        references=np.array([numbers[label] for label in labels], np.int64),
        answers=np.array([numbers.get(p.strip(), -1) for p in answers.predictions], np.int64),
        labels=len(numbers),
        metric=metric,
    )
