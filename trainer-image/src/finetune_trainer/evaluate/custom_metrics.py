"""Metrics of the user's own (``evaluation.customMetrics``), by entry points in the trainer image.

    entry point ──► function: samples with answers ──► one score for each

A function gets what predictions.jsonl has, so that it can be tried on a published file. Its code
runs as it is: whoever chooses the image trusts it.
"""

from __future__ import annotations

import logging
import math
import numbers
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import TypedDict

from finetune_api.custom_metrics import METRIC_GROUP, CustomMetric
from finetune_trainer.failures import UserError
from finetune_trainer.liveness import progressed

log = logging.getLogger(__name__)


class AnsweredSample(TypedDict):
    """A sample of a test or retention set, with the answer of one row of the results."""

    prompt: str
    reference: str
    label: str | None
    """The reference label, for format Classification."""
    answer: str
    fields: dict[str, str]
    """Values of the fields of evaluation.slices; none for a retention set."""


MetricFunction = Callable[[Sequence[AnsweredSample]], Sequence[float]]


def load_metrics(declared: Sequence[CustomMetric]) -> dict[str, MetricFunction]:
    """Import the code of the declared metrics, by name.

    Raises:
        UserError: 'MetricNotInstalled', 'MetricFailed', naming the metric, its package, and what to
            do.
    """
    return {metric.name: _load(metric.name) for metric in declared}


def _load(name: str) -> MetricFunction:
    there = entry_points(group=METRIC_GROUP)
    found = [point for point in there if point.name == name]
    if len(found) != 1:
        names = ", ".join(sorted({point.name for point in there})) or "none"
        packages = " and ".join(sorted(map(_package, found)))
        why = f"several packages have it: {packages}" if found else f"available: {names}"
        raise UserError(
            "MetricNotInstalled",
            f"spec.evaluation.customMetrics: {name} needs one entry point of this name in group"
            f" {METRIC_GROUP}, in the trainer image ({why}); install the metric's package there"
            " (spec.compute.image), or correct the name",
        )
    try:
        function = found[0].load()
    except Exception as error:
        raise _failed(name, f"cannot be loaded from {_place(found[0])}", error) from error
    if not callable(function):
        raise _failed(name, f"{_place(found[0])} is no function, but {type(function).__name__}")
    log.info("metric %s: %s", name, _place(found[0]))
    return function  # type: ignore[no-any-return]


def scores_of(
    metric: CustomMetric, function: MetricFunction, samples: Sequence[AnsweredSample], where: str
) -> list[float]:
    """Return the score of each sample.

    Args:
        where: whose answers they are, for messages: ``set support, row Tuned``.

    Raises:
        UserError: 'MetricFailed': the function raised, or returned something else than one finite
            number for each sample (with ``percent``, from 0 to 1). Names the first such sample.
    """
    progressed()
    try:
        scores = list(function(samples))
    except Exception as error:
        at = _first_failing(function, samples)
        place = where if at is None else f"{where}, sample {at}"
        raise _failed(metric.name, f"failed on {place}", error) from error
    progressed()
    if len(scores) != len(samples):
        raise _failed(
            metric.name, f"returned {len(scores)} scores for {len(samples)} samples of {where}"
        )
    for number, score in enumerate(scores):
        if not _is_score(score, metric.percent):
            allowed = "a number from 0 to 1 (or declare percent: false)"
            raise _failed(
                metric.name,
                f"returned {score!r:.60} for {where}, sample {number}; a score is"
                f" {allowed if metric.percent else 'a finite number'}",
            )
    return [float(score) for score in scores]


def _is_score(score: object, percent: bool) -> bool:
    # numpy's scalars are registered as Real.
    if not isinstance(score, numbers.Real) or not math.isfinite(score):
        return False
    return not percent or 0 <= float(score) <= 1


def _first_failing(function: MetricFunction, samples: Sequence[AnsweredSample]) -> int | None:
    """Number of the first sample that fails by itself; None: only several together fail."""
    for number, sample in enumerate(samples):
        try:
            function([sample])
        except Exception:
            return number
    return None


def _failed(name: str, what: str, error: Exception | None = None) -> UserError:
    cause = "" if error is None else f": {type(error).__name__}: {error}"
    return UserError(
        "MetricFailed",
        f"spec.evaluation.customMetrics: {name} {what}{cause}. Correct its code in the trainer"
        " image (spec.compute.image): a run that has trained goes on from there",
    )


def _place(point: EntryPoint) -> str:
    return f"{point.value} of package {_package(point)}"


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "(unknown)"
