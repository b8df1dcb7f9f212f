"""Tests of the difference of two scores over groups of samples, with intervals.

Pure. Samples of one group (a customer, a document) are drawn and flipped together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from finetune_api.evaluation_results import ComparisonTest
from finetune_trainer.evaluate.weighted_scores import Floats, Groups, Ratio, Score

ALPHA: Final = 0.05
"""Two-sided level of every test; intervals have the confidence 1 - ALPHA."""
_DRAWS: Final = (500, 2000)
"""Fewest and most draws of a bootstrap."""
_FLIPS: Final = 9999
_WORK: Final = 20_000_000
"""Draws times samples above which the fewest suffice: GPUs wait for the comparison."""
_WEIGHTS_AT_ONCE: Final = 1 << 22
"""Draws times samples in memory together: 32 MiB."""
_SEED: Final = 20_240_601


class Tested(NamedTuple):
    """A test of a difference."""

    test: ComparisonTest
    p: float
    low: float
    """Lower end of the interval."""
    high: float
    error: float
    """Standard error of the difference."""


@dataclass(frozen=True)
class Discordance:
    """Right and wrong answers of two models to the same samples."""

    both: int
    only_new: int
    only_old: int
    neither: int

    @classmethod
    def of(cls, old: Floats, new: Floats) -> Discordance:
        """Count answers that are 1 (right) or 0 (wrong), shape [samples] each."""
        a, b = old > 0.5, new > 0.5
        return cls(
            int((a & b).sum()), int((~a & b).sum()), int((a & ~b).sum()), int((~a & ~b).sum())
        )

    @property
    def samples(self) -> int:
        return self.both + self.only_new + self.only_old + self.neither

    def tested(self) -> Tested:
        return Tested("McNemar", self.p, *self.interval, self.standard_error)

    @property
    def p(self) -> float:
        """Two-sided exact McNemar test."""
        from scipy.stats import binomtest

        differ = self.only_new + self.only_old
        return float(binomtest(self.only_new, differ).pvalue) if differ else 1.0

    @property
    def interval(self) -> tuple[float, float]:
        """Interval of the difference of the shares of right answers (Newcombe 1998, method 10: of
        two Wilson intervals and their correlation)."""
        n = self.samples
        right_new, right_old = self.both + self.only_new, self.both + self.only_old
        low_new, high_new = wilson(right_new, n)
        low_old, high_old = wilson(right_old, n)
        new, old = right_new / n, right_old / n
        phi = self._correlation
        below = (new - low_new, high_old - old)
        above = (high_new - new, old - low_old)
        spread = [math.sqrt(x * x - 2 * phi * x * y + y * y) for x, y in (below, above)]
        return new - old - spread[0], new - old + spread[1]

    @property
    def _correlation(self) -> float:
        """Of the two models' answers, with Newcombe's correction for continuity."""
        a, b, c, d = self.both, self.only_new, self.only_old, self.neither
        product = (a + b) * (c + d) * (a + c) * (b + d)
        if product == 0:
            return 0.0
        excess: float = a * d - b * c
        if excess > 0:
            excess = max(excess - self.samples / 2, 0)
        return excess / math.sqrt(product)

    @property
    def standard_error(self) -> float:
        """Of the difference. One more discordant pair than seen is assumed, so that few samples
        without any do not look like certainty."""
        n = self.samples
        differ = (self.only_new + self.only_old + 1) / (n + 1)
        mean = (self.only_new - self.only_old) / n
        return math.sqrt(max(differ - mean * mean, 0.0) / n)


def numbered(groups: Groups | None, samples: int) -> tuple[npt.NDArray[np.int64], int]:
    """Groups numbered without gaps, shape [samples], and how many there are."""
    if groups is None:
        return np.arange(samples), samples
    numbers: npt.NDArray[np.int64] = np.unique(groups, return_inverse=True)[1]
    return numbers, int(numbers.max()) + 1 if len(numbers) else 0


def wilson(right: int, samples: int) -> tuple[float, float]:
    """Interval of a share (Wilson 1927)."""
    from scipy.stats import binomtest

    found = binomtest(right, samples).proportion_ci(1 - ALPHA, method="wilson")
    return float(found.low), float(found.high)


def without_spread(found: Tested, effect: float, groups: int, span: float) -> Tested:
    """A test whose groups all differ equally, which leaves nothing to resample: none of them, or
    all of them wholly. The interval is Wilson's of as many groups without any other one; for the
    error one other group is assumed (see ``Discordance.standard_error``).

    Args:
        span: see ``Scale``.
    """
    spread = span * wilson(0, groups)[1]
    low, high = max(effect - spread, -span), min(effect + spread, span)
    return found._replace(low=low, high=high, error=0.0 if effect else span / groups)


def difference(old: Score, new: Score, weights: Floats) -> Floats:
    """Value of the new model minus that of the old one, shape [draws].

    Args:
        weights: shape [draws, samples].
    """
    with np.errstate(invalid="ignore"):  # of undefined values
        found: Floats = new(weights) - old(weights)
    return found


def paired_t(old: Ratio, new: Ratio, groups: npt.NDArray[np.int64]) -> Tested:
    """Paired t test of what each group adds to the difference, by the delta method for a ratio of
    sums: with so many groups the difference is normal, and resampling them takes minutes."""
    from scipy.stats import ttest_1samp

    added = sum(
        sign * (score.sums - value * score.counts) / score.counts.sum()
        for sign, score, value in (
            (1, new, new.sums.sum() / new.counts.sum()),
            (-1, old, old.sums.sum() / old.counts.sum()),
        )
    )
    by_group = np.bincount(groups, added)
    count = len(by_group)
    error = float(by_group.std(ddof=1) * math.sqrt(count))
    effect = float(new.sums.sum() / new.counts.sum() - old.sums.sum() / old.counts.sum())
    if error == 0:
        return Tested("PairedT", 0.0 if effect else 1.0, effect, effect, 0.0)
    found = ttest_1samp(by_group + effect / count, 0.0)
    spread = normal_quantile(1 - ALPHA / 2) * error
    return Tested("PairedT", float(found.pvalue), effect - spread, effect + spread, error)


def bootstrap(old: Score, new: Score, groups: npt.NDArray[np.int64]) -> Tested:
    """Percentile interval of the paired bootstrap over groups, with the p of sign flips where
    samples have a sum each, else of the bootstrap.

    Args:
        groups: as ``numbered`` returns them.
    """
    draws = np.concatenate([difference(old, new, w) for w in bootstrap_weights(groups)])
    draws = draws[np.isfinite(draws)]
    low, high = (float(q) for q in np.quantile(draws, [ALPHA / 2, 1 - ALPHA / 2]))
    error = float(draws.std(ddof=1))
    # With the same counts, swapping two answers swaps their sums.
    if isinstance(old, Ratio) and isinstance(new, Ratio) and np.array_equal(old.counts, new.counts):
        return Tested("SignFlip", _sign_flip(old.sums, new.sums, groups), low, high, error)
    return Tested("PairedBootstrap", _bootstrap_p(draws), low, high, error)


def bootstrap_weights(groups: npt.NDArray[np.int64]) -> Iterator[Floats]:
    """Yield the weights of bootstrap samples over groups, shape [some draws, samples]."""
    random, count = np.random.default_rng(_SEED), int(groups.max()) + 1
    at_once = max(1, _WEIGHTS_AT_ONCE // len(groups))
    draws = max(_DRAWS[0], min(_DRAWS[1], _WORK // len(groups)))
    for start in range(0, draws, at_once):
        drawn = random.multinomial(count, np.full(count, 1 / count), min(at_once, draws - start))
        yield drawn.astype(np.float64)[:, groups]


def _sign_flip(old: Floats, new: Floats, groups: npt.NDArray[np.int64]) -> float:
    """Two-sided permutation test: under the null hypothesis a group's two sums may be swapped."""
    from scipy.stats import permutation_test

    sums = tuple(np.bincount(groups, values).astype(np.float64) for values in (new, old))
    if len(sums[0]) < 2 or np.array_equal(sums[0], sums[1]):
        return 1.0
    found = permutation_test(
        sums, lambda x, y, axis: (x - y).mean(axis=axis), permutation_type="samples",
        n_resamples=_FLIPS, vectorized=True, batch=max(1, _WEIGHTS_AT_ONCE // len(sums[0])),
        rng=np.random.default_rng(_SEED),
    )  # fmt: skip
    return float(found.pvalue)


def _bootstrap_p(draws: Floats) -> float:
    """Two-sided p of no difference: the level at which the percentile interval touches zero."""
    smaller = min((draws <= 0).sum(), (draws >= 0).sum())
    return float(min(1.0, 2 * (smaller + 1) / (len(draws) + 1)))


def normal_quantile(quantile: float) -> float:
    """Quantile of the standard normal distribution."""
    from scipy.stats import norm

    return float(norm.ppf(quantile))
