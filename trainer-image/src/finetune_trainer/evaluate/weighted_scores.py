"""Metrics of one model's answers as functions of the weights of the samples, for the bootstrap.

    answers ──► Score: sample weights → value of the metric

Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Groups = npt.NDArray[np.integer[Any]]
"""Number of each sample's group, shape [samples]; any numbers."""


Macro = Literal["Precision", "Recall", "F1"]


class Score(Protocol):
    """A metric of one model's answers to a set."""

    @property
    def samples(self) -> int:
        """Number of samples."""
        ...

    def __call__(self, weights: Floats) -> Floats:
        """Value of the metric if each sample counts as often as its weight.

        Args:
            weights: shape [draws, samples].

        Returns:
            Shape [draws]; NaN where no sample counts.
        """
        ...


@dataclass(frozen=True)
class Ratio:
    """A metric that is a ratio of two sums: a mean over samples, or a loss per token."""

    sums: Floats
    """Shape [samples]."""
    counts: Floats
    """Shape [samples]."""

    @classmethod
    def mean(cls, values: Sequence[float] | npt.NDArray[Any]) -> Ratio:
        """The mean of one value a sample."""
        found = np.asarray(values, np.float64)
        return cls(found, np.ones_like(found))

    @property
    def samples(self) -> int:
        return len(self.sums)

    def __call__(self, weights: Floats) -> Floats:
        with np.errstate(invalid="ignore", divide="ignore"):
            found: Floats = (weights @ self.sums) / (weights @ self.counts)
        return found


@dataclass(frozen=True)
class MacroScore:
    """Precision, recall or F1, averaged over the labels that occur among the references."""

    references: npt.NDArray[np.int64]
    """Number of the reference label, shape [samples]."""
    answers: npt.NDArray[np.int64]
    """Number of the predicted label; -1: none of the labels. Shape [samples]."""
    labels: int
    """Number of labels."""
    metric: Macro

    @property
    def samples(self) -> int:
        return len(self.references)

    @cached_property
    def _one_hot(self) -> tuple[Floats, Floats, Floats]:
        """Right answers, answers and references, shape [samples, labels] each."""
        numbers = np.arange(self.labels)
        answered = (self.answers[:, None] == numbers).astype(np.float64)
        wanted = (self.references[:, None] == numbers).astype(np.float64)
        return answered * wanted, answered, wanted

    def __call__(self, weights: Floats) -> Floats:
        right, answered, wanted = (weights @ part for part in self._one_hot)
        if self.metric == "Precision":
            of = answered
        elif self.metric == "Recall":
            of = wanted
        else:
            right, of = 2 * right, answered + wanted
        each = np.divide(right, of, out=np.zeros_like(right), where=of > 0)
        occurs = wanted > 0
        with np.errstate(invalid="ignore"):
            found: Floats = (each * occurs).sum(1) / occurs.sum(1)
        return found


@dataclass(frozen=True)
class SummedScore:
    """A metric that is a function of sums over samples, such as corpus BLEU."""

    statistics: Floats
    """Shape [samples, statistics]."""
    of: Callable[[Sequence[float]], float]
    """The metric of the sums."""

    @property
    def samples(self) -> int:
        return len(self.statistics)

    def __call__(self, weights: Floats) -> Floats:
        return np.array([self.of(row) for row in (weights @ self.statistics).tolist()])


def value_of(score: Score) -> float:
    """Value of a metric if each sample counts once."""
    return float(score(np.ones((1, score.samples)))[0])


def are_binary(*scores: Ratio) -> bool:
    """Whether each sample is right (1) or wrong (0)."""
    return all(bool(np.all(s.counts == 1) and np.isin(s.sums, (0.0, 1.0)).all()) for s in scores)
