"""How many steps a training takes, and what happens at each: pure functions of the spec.

Steps are counted from 0: step *t* is the one that is taken when *t* optimizer steps are done.
"""

from __future__ import annotations

import math
from typing import Final

from finetune_api.spec import FineTuneJobSpec

_EVALUATIONS: Final = 10
"""Evaluations over a run whose spec names no cadence."""

_LOG_POINTS: Final = 100
_LOG_INTERVAL_MAX: Final = 10


def steps_of(spec: FineTuneJobSpec, train_samples: int) -> int:
    """Optimizer steps of a run. The last batch of an epoch is trained as it is, however short, so
    an epoch has ceil(samples / batchSize) steps."""
    epochs = spec.effective_epochs
    if epochs is None:
        assert spec.training.max_steps is not None, "maxSteps decides where epochs do not"
        return spec.training.max_steps
    return epochs * -(-train_samples // spec.training.batch_size)


def evaluation_steps(spec: FineTuneJobSpec, total: int) -> range:
    """Numbers of done steps after which the validation sets are measured; the end of the run is
    measured besides, on it or not. ``x in evaluation_steps(...)`` costs nothing."""
    every = spec.evaluation.every_steps or max(1, -(-total // _EVALUATIONS))
    return range(every, total + 1, every)


def log_interval(total: int) -> int:
    """Steps between two points of the learning curve: about a hundred points, never more than ten
    steps apart."""
    return max(1, min(_LOG_INTERVAL_MAX, total // _LOG_POINTS))


def learning_rate(spec: FineTuneJobSpec, total: int, step: int) -> float:
    """Learning rate of a step.

    With W = ceil(warmupRatio · total) steps of warm-up, step t < W has peak · (t + 1) / W: no step
    is wasted at zero, and the last one of them has the peak. From W on, p = (t - W) / (total - W)
    is the part of the way done, and the rate is peak · (1 + cos πp) / 2 (Cosine; Loshchilov &
    Hutter 2017), peak · (1 - p) (Linear) or peak (Constant): zero would be reached at ``total``,
    which is not taken.
    """
    peak = spec.effective_learning_rate
    warmup = math.ceil(float(spec.training.warmup_ratio) * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    if spec.training.schedule == "Cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * done))
    return peak * (1.0 - done) if spec.training.schedule == "Linear" else peak
