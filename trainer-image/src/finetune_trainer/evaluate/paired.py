"""Paired comparison of two models by one metric, from their answers to the same samples.

    each model's answers ──► Score: sample weights → value of the metric
    two Scores ──► bootstrap over groups ──► interval of the difference ──┐
             └──► test for the kind of metric ──► p ──────────────────────┴──► Comparison, verdict

Pure. Samples of one group (a customer, a document) are not independent: they are drawn and flipped
together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from finetune_api.evaluation_results import Comparison, ComparisonTest, Verdict

ALPHA: Final = 0.05
"""Two-sided level of every test; intervals have the confidence 1 - ALPHA."""
POWER: Final = 0.8
"""Probability with which a gain of the detectable effect is found."""
FEWEST_GROUPS: Final = 20
"""With fewer groups a bootstrap interval is too narrow to decide anything."""
MANY_GROUPS: Final = 10_000
"""With more groups a mean is tested by a t test."""
_DRAWS: Final = (500, 2000)
"""Fewest and most draws of a bootstrap."""
_FLIPS: Final = 9999
_WORK: Final = 20_000_000
"""Draws times samples above which the fewest suffice: GPUs wait for the comparison."""
_WEIGHTS_AT_ONCE: Final = 1 << 22
"""Draws times samples in memory together: 32 MiB."""
_SEED: Final = 20_240_601

Floats = npt.NDArray[np.float64]
Groups = npt.NDArray[np.integer[Any]]
"""Number of each sample's group, shape [samples]; any numbers."""


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
    metric: Literal["Precision", "Recall", "F1"]

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


@dataclass(frozen=True)
class Scale:
    """How differences of a metric are judged."""

    higher_is_better: bool
    min_effect: float
    """Smallest gain that matters, in units of the metric, above 0."""
    span: float | None = None
    """Best value of the metric minus its worst; None: it has no limits."""

    @property
    def sign(self) -> int:
        return 1 if self.higher_is_better else -1


def compare(
    old: Score,
    new: Score,
    scale: Scale,
    groups: Groups | None = None,
) -> Comparison | None:
    """Compare a new model with an old one by a metric of the same samples. None: a value of the
    metric is undefined (no samples, or a loss that is not finite).

    - Right or wrong a sample (``Ratio.mean`` of 0 and 1), each a group of its own: exact McNemar
      test (McNemar 1947) and the interval of Newcombe (1998, method 10) for a paired difference of
      proportions.
    - Other means, and right or wrong in groups: sign-flip permutation test over groups
      (``scipy.stats.permutation_test``); with more than MANY_GROUPS groups, a paired t test.
    - The rest: paired bootstrap over groups (Efron and Tibshirani 1993).

    Intervals are percentiles of the paired bootstrap, apart from those of McNemar and t tests.

    Args:
        groups: of the samples; None: each sample is one.

    Raises:
        ValueError: the scores are of different samples.
    """
    if old.samples != new.samples:
        raise ValueError(f"scores of {old.samples} and {new.samples} samples")
    groups, count = _numbered(groups, new.samples)
    everything = np.ones((1, new.samples))
    effect = float(_difference(old, new, everything)[0]) if count else math.nan
    if count == 0 or not math.isfinite(effect):
        return None
    few = False
    answers = _right_and_wrong(old, new)
    if answers is not None and count == new.samples:
        found = answers.tested()
    elif count > MANY_GROUPS and isinstance(old, Ratio) and isinstance(new, Ratio):
        found = _paired_t(old, new, groups)
    else:
        found, few = _bootstrap(old, new, groups), count < FEWEST_GROUPS
    span = scale.span if answers is None else 1.0
    if found.low == found.high and span is not None:
        found = _without_spread(found, effect, count, span)
    detectable = (_normal(1 - ALPHA / 2) + _normal(POWER)) * found.error
    needed = math.ceil(new.samples * (detectable / scale.min_effect) ** 2)
    if few:
        needed = max(needed, math.ceil(FEWEST_GROUPS * new.samples / count))
    interval = found.low, found.high
    decided = "TooFewSamples" if few else verdict(effect, interval, found.p, scale)
    return Comparison(
        effect=effect,
        low=found.low,
        high=found.high,
        p=found.p,
        test=found.test,
        groups=count,
        detectable=detectable,
        verdict=decided,
        needed_samples=needed if decided == "TooFewSamples" else None,
    )


class Estimated(NamedTuple):
    """A value with its interval."""

    value: float
    low: float | None
    """Lower end; None: too few groups for an interval."""
    high: float | None


def estimate(
    score: Score, groups: Groups | None = None, span: float | None = None
) -> Estimated | None:
    """Value of a metric with its interval. None: undefined.

    The interval is Wilson's for shares of samples that are groups of their own (Wilson 1927), else
    of the percentiles of the bootstrap over groups, from FEWEST_GROUPS on; with more than
    MANY_GROUPS groups, of a mean's normal distribution. Where all resamples are equal, as where all
    answers are right, it is Wilson's of as many groups.

    Args:
        groups: as for ``compare``.
        span: as in ``Scale``; the worst value is 0.
    """
    if not score.samples:
        return None
    value = value_of(score)
    if not math.isfinite(value):
        return None
    groups, count = _numbered(groups, score.samples)
    share = isinstance(score, Ratio) and _are_binary(score)
    if share and (count == score.samples or value in (0.0, 1.0)):
        # In groups that are all right or all wrong there is nothing to resample: a group is then
        # one answer.
        return Estimated(value, *_wilson(round(value * count), count))
    if isinstance(score, Ratio) and count > MANY_GROUPS:
        zero = Ratio(np.zeros_like(score.sums), score.counts)
        tested = _paired_t(zero, score, groups)
        return Estimated(value, tested.low, tested.high)
    if count < FEWEST_GROUPS:
        return Estimated(value, None, None)
    draws = np.concatenate([score(weights) for weights in _weights(groups)])
    low, high = np.quantile(draws[np.isfinite(draws)], [ALPHA / 2, 1 - ALPHA / 2])
    if low == high and span is not None:
        ends = _wilson(round(value / span * count), count)
        return Estimated(value, *(min(max(end, 0.0), 1.0) * span for end in ends))
    return Estimated(value, float(low), float(high))


def value_of(score: Score) -> float:
    """Value of a metric if each sample counts once."""
    return float(score(np.ones((1, score.samples)))[0])


def holm(ps: Sequence[float]) -> list[float]:
    """Adjust the p values of several tests, so that the probability of any false claim among them
    stays below the level (Holm 1979)."""
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, at in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[at]))
        adjusted[at] = highest
    return adjusted


def verdict(effect: float, interval: tuple[float, float], p: float, scale: Scale) -> Verdict:
    """What a comparison allows to say, at level ALPHA.

    NotBetter: a gain of ``min_effect`` is ruled out, though the new model is not significantly
    worse. TooFewSamples: neither a difference nor its absence is shown.
    """
    gain = scale.sign * effect
    highest_gain = max(scale.sign * end for end in interval)
    if p < ALPHA and gain < 0:
        return "Worse"
    if highest_gain < scale.min_effect:
        return "NotBetter"
    return "Better" if p < ALPHA and gain > 0 else "TooFewSamples"


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
        low_new, high_new = _wilson(right_new, n)
        low_old, high_old = _wilson(right_old, n)
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


def _numbered(groups: Groups | None, samples: int) -> tuple[npt.NDArray[np.int64], int]:
    """Groups numbered without gaps, shape [samples], and how many there are."""
    if groups is None:
        return np.arange(samples), samples
    numbers: npt.NDArray[np.int64] = np.unique(groups, return_inverse=True)[1]
    return numbers, int(numbers.max()) + 1 if len(numbers) else 0


def _wilson(right: int, samples: int) -> tuple[float, float]:
    """Interval of a share (Wilson 1927)."""
    from scipy.stats import binomtest

    found = binomtest(right, samples).proportion_ci(1 - ALPHA, method="wilson")
    return float(found.low), float(found.high)


def _without_spread(found: Tested, effect: float, groups: int, span: float) -> Tested:
    """A test whose groups all differ equally, which leaves nothing to resample: none of them, or
    all of them wholly. The interval is Wilson's of as many groups without any other one; for the
    error one other group is assumed (see ``Discordance.standard_error``).

    Args:
        span: see ``Scale``.
    """
    spread = span * _wilson(0, groups)[1]
    low, high = max(effect - spread, -span), min(effect + spread, span)
    return found._replace(low=low, high=high, error=0.0 if effect else span / groups)


def _difference(old: Score, new: Score, weights: Floats) -> Floats:
    with np.errstate(invalid="ignore"):  # of undefined values
        found: Floats = new(weights) - old(weights)
    return found


def _right_and_wrong(old: Score, new: Score) -> Discordance | None:
    """The answers, if each sample is right or wrong."""
    if isinstance(old, Ratio) and isinstance(new, Ratio) and _are_binary(old, new):
        return Discordance.of(old.sums, new.sums)
    return None


def _are_binary(*scores: Ratio) -> bool:
    """Whether each sample is right (1) or wrong (0)."""
    return all(bool(np.all(s.counts == 1) and np.isin(s.sums, (0.0, 1.0)).all()) for s in scores)


def _paired_t(old: Ratio, new: Ratio, groups: npt.NDArray[np.int64]) -> Tested:
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
    spread = _normal(1 - ALPHA / 2) * error
    return Tested("PairedT", float(found.pvalue), effect - spread, effect + spread, error)


def _bootstrap(old: Score, new: Score, groups: npt.NDArray[np.int64]) -> Tested:
    draws = np.concatenate([_difference(old, new, w) for w in _weights(groups)])
    draws = draws[np.isfinite(draws)]
    low, high = (float(q) for q in np.quantile(draws, [ALPHA / 2, 1 - ALPHA / 2]))
    error = float(draws.std(ddof=1))
    # With the same counts, swapping two answers swaps their sums.
    if isinstance(old, Ratio) and isinstance(new, Ratio) and np.array_equal(old.counts, new.counts):
        return Tested("SignFlip", _sign_flip(old.sums, new.sums, groups), low, high, error)
    return Tested("PairedBootstrap", _bootstrap_p(draws), low, high, error)


def _weights(groups: npt.NDArray[np.int64]) -> Iterator[Floats]:
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


def _normal(quantile: float) -> float:
    from scipy.stats import norm

    return float(norm.ppf(quantile))
