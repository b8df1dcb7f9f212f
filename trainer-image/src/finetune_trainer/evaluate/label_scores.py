"""Labels chosen by their log-likelihoods after a prompt, and calibration of their probabilities.

    log-likelihoods of all labels ──(rule of a metric)──► chosen label ──► right or wrong
                                  └─(softmax)──► confidence in 15 bins ──► calibration error

Pure. Of labels that are equally likely, the first counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Final

import numpy as np
import numpy.typing as npt

from finetune_api.tasks import Metric
from finetune_trainer.storage.runfiles import LabelScores

BINS: Final = 15
"""Bins of the calibration error (Guo et al. 2017)."""
CHOOSING: Final[tuple[Metric, ...]] = (
    "LabelAccuracy", "LabelAccuracyPerToken", "LabelAccuracyPerCharacter"
)  # fmt: skip
"""Metrics with a rule that chooses a label."""

Floats = npt.NDArray[np.float64]
Tokens = tuple[int, ...]


def scored_tokens(labels: Mapping[str, Sequence[int]], stops: Sequence[int]) -> list[Tokens]:
    """Return the tokens of each label whose log-likelihoods are summed.

    The token that ends an answer is none of them, as in lm-evaluation-harness; a base model has not
    learned it. But a label that another one begins with ("10" and "1") would always be likelier, so
    in a set with such labels the end token of all labels counts.

    Args:
        labels: with the tokens of each as training has them.
        stops: tokens that end an answer.
    """
    whole = [tuple(tokens) for tokens in labels.values()]
    bare = [tokens[:-1] if tokens[-1] in stops else tokens for tokens in whole]
    begins = any(
        one == other[: len(one)]
        for (i, one), (j, other) in product(enumerate(bare), repeat=2)
        if i != j
    )
    return whole if begins else bare


def chosen(found: LabelScores, metric: Metric) -> list[str]:
    """Return the label of each sample that a metric of ``CHOOSING`` chooses.

    - LabelAccuracy: the likeliest (``acc`` of lm-evaluation-harness).
    - LabelAccuracyPerToken: by log-likelihoods divided by the label's tokens.
    - LabelAccuracyPerCharacter: divided by its characters (``acc_norm``).
    """
    sizes = {
        "LabelAccuracyPerToken": found.tokens,
        "LabelAccuracyPerCharacter": [len(label) for label in found.labels],
    }
    best = (_values(found) / sizes.get(metric, [1] * len(found.labels))).argmax(1)
    return [found.labels[number] for number in best.tolist()]


def calibration_statistics(found: LabelScores, wanted: Sequence[str]) -> list[list[float]]:
    """Return for each sample, in the bin of the probability of its likeliest label, 1 if that label
    is right, less the probability; in the other bins 0; and a 1 behind the bins. The sums give
    ``calibration_error``. Probabilities are the softmax over the log-likelihoods.

    Args:
        wanted: right label of each sample.
    """
    values = _values(found)
    shifted = np.exp(values - values.max(1, keepdims=True))
    confidence = (shifted / shifted.sum(1, keepdims=True)).max(1)
    right = np.array([c == w for c, w in zip(chosen(found, "LabelAccuracy"), wanted, strict=True)])
    # Bin m is ((m - 1) / BINS, m / BINS].
    bins = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    statistics = np.zeros((len(wanted), BINS + 1))
    statistics[np.arange(len(wanted)), bins] = right - confidence
    statistics[:, BINS] = 1
    rows: list[list[float]] = statistics.tolist()
    return rows


def calibration_error(sums: Sequence[float]) -> float:
    """Return the expected calibration error of the sums of ``calibration_statistics``: the mean
    over the samples of the distance between the accuracy and the mean probability of their bin."""
    return sum(map(abs, sums[:BINS])) / sums[BINS] if sums[BINS] else float("nan")


def _values(found: LabelScores) -> Floats:
    """Log-likelihoods, shape [samples, labels]; of a diverged model, very small ones."""
    values = np.array(found.values, np.float64).reshape(-1, len(found.labels))
    return np.nan_to_num(values, nan=-1e300, neginf=-1e300, posinf=-1e300)
