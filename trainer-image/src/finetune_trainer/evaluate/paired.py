"""Paired comparison of two models by one metric, from their answers to the same samples.

    two Scores ──► bootstrap over groups ──► interval of the difference ──┐
             └──► test for the kind of metric ──► p ──────────────────────┴──► Comparison, verdict

Pure. Samples of one group (a customer, a document) are not independent: they are drawn and flipped
together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from finetune_api.evaluation_results import Comparison, Verdict
from finetune_trainer.evaluate.paired_tests import (
    ALPHA,
    Discordance,
    bootstrap,
    bootstrap_weights,
    difference,
    normal_quantile,
    numbered,
    paired_t,
    wilson,
    without_spread,
)
from finetune_trainer.evaluate.weighted_scores import Groups, Ratio, Score, are_binary, value_of

POWER: Final = 0.8
"""Probability with which a gain of the detectable effect is found."""
FEWEST_GROUPS: Final = 20
"""With fewer groups a bootstrap interval is too narrow to decide anything."""
MANY_GROUPS: Final = 10_000
"""With more groups a mean is tested by a t test."""


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
    groups, count = numbered(groups, new.samples)
    everything = np.ones((1, new.samples))
    effect = float(difference(old, new, everything)[0]) if count else math.nan
    if count == 0 or not math.isfinite(effect):
        return None
    few = False
    answers = _right_and_wrong(old, new)
    if answers is not None and count == new.samples:
        found = answers.tested()
    elif count > MANY_GROUPS and isinstance(old, Ratio) and isinstance(new, Ratio):
        found = paired_t(old, new, groups)
    else:
        found, few = bootstrap(old, new, groups), count < FEWEST_GROUPS
    span = scale.span if answers is None else 1.0
    if found.low == found.high and span is not None:
        found = without_spread(found, effect, count, span)
    detectable = (normal_quantile(1 - ALPHA / 2) + normal_quantile(POWER)) * found.error
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
    groups, count = numbered(groups, score.samples)
    share = isinstance(score, Ratio) and are_binary(score)
    if share and (count == score.samples or value in (0.0, 1.0)):
        # In groups that are all right or all wrong there is nothing to resample: a group is then
        # one answer.
        return Estimated(value, *wilson(round(value * count), count))
    if isinstance(score, Ratio) and count > MANY_GROUPS:
        zero = Ratio(np.zeros_like(score.sums), score.counts)
        tested = paired_t(zero, score, groups)
        return Estimated(value, tested.low, tested.high)
    if count < FEWEST_GROUPS:
        return Estimated(value, None, None)
    draws = np.concatenate([score(weights) for weights in bootstrap_weights(groups)])
    low, high = np.quantile(draws[np.isfinite(draws)], [ALPHA / 2, 1 - ALPHA / 2])
    if low == high and span is not None:
        ends = wilson(round(value / span * count), count)
        return Estimated(value, *(min(max(end, 0.0), 1.0) * span for end in ends))
    return Estimated(value, float(low), float(high))


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


def _right_and_wrong(old: Score, new: Score) -> Discordance | None:
    """The answers, if each sample is right or wrong."""
    if isinstance(old, Ratio) and isinstance(new, Ratio) and are_binary(old, new):
        return Discordance.of(old.sums, new.sums)
    return None
