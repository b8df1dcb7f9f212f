"""Number of steps of a training, and what happens at each: pure functions of the spec.

Steps are counted from 0: step *t* runs after *t* optimizer steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Final

from finetune_api.results import StagePlan
from finetune_api.sources import Data, DataStage
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine.planning.mixture import Stage
from finetune_trainer.failures import UserError

_EVALUATIONS: Final = 10
"""Evaluations of a run whose spec sets no interval."""

_LOG_POINTS: Final = 100
_LOG_INTERVAL_MAX: Final = 10


def steps_of(spec: FineTuneJobSpec, train_samples: int) -> int:
    """Return the number of optimizer steps of a run; 0: it trains nothing. Batches cross epoch
    boundaries; the last batch of the run may be shorter. A batch never has more samples than the
    training set."""
    if not spec.method.kind.trains:
        return 0
    visits = visits_of(spec, train_samples)
    if visits is None:
        assert spec.training.max_steps is not None, "maxSteps decides where epochs do not"
        return spec.training.max_steps
    return -(-visits // min(spec.training.batch_size, train_samples))


def visits_of(spec: FineTuneJobSpec, train_samples: int) -> int | None:
    """Return the number of samples that a run trains, counting every visit; None where
    ``training.maxSteps`` decides."""
    epochs = spec.effective_epochs
    return None if epochs is None else epochs * train_samples


def stages_of(spec: FineTuneJobSpec, sets: Mapping[str, int], total: int) -> list[Stage]:
    """Return the stages of a training: steps and mixture of each.

    Args:
        sets: tokens of each training set, by name, in the order of the plan's sources.
        total: steps of the run.

    Raises:
        UserError: 'NothingToMix' where all sets of a stage's mixture are empty; 'StageTooShort'
            where a stage has no step.
    """
    if spec.data.stages is None:
        return [Stage(total, _shares(spec.data, None, sets, "data.train"))]
    parts = [Fraction(stage.steps) for stage in spec.data.stages]
    # Exact fractions, rounded half up: a stage whose share is at least one step always has one.
    ends = [math.floor(total * part / sum(parts) + Fraction(1, 2)) for part in accumulate(parts)]
    found = []
    for i, (stage, begin, end) in enumerate(zip(spec.data.stages, [0, *ends], ends, strict=False)):
        if begin == end:
            raise UserError(
                "StageTooShort",
                f"spec.data.stages[{i}]: stage {stage.name!r} would have no step: its share is"
                f" {float(parts[i] / sum(parts)):.2%} of the training's {total} steps. Raise its"
                " steps, take it out, or train for more steps (training.epochs, training.maxSteps,"
                " or a lower training.batchSize)",
            )
        shares = _shares(spec.data, stage, sets, f"data.stages[{i}]")
        found.append(Stage(end - begin, shares, stage.name))
    return found


def stage_plans(stages: Sequence[Stage], sets: Mapping[str, int]) -> list[StagePlan]:
    """Return name, steps and mixture of each stage; empty where the spec has no stages.

    Args:
        sets: the ``sets`` argument of ``stages_of``, which made the stages.
    """
    plans = []
    for stage in stages:
        if stage.name is None:
            continue
        weights = [float(tokens) for tokens in sets.values()]
        if stage.shares is not None:
            weights = list(stage.shares)
        mixture = {
            name: round(weight / sum(weights), 4)
            for name, weight in zip(sets, weights, strict=True)
            if weight
        }
        plans.append(StagePlan(name=stage.name, steps=stage.steps, mixture=mixture))
    return plans


def _shares(
    data: Data, stage: DataStage | None, sets: Mapping[str, int], path: str
) -> list[float] | None:
    """Return the shares of the tokens by set; None: in proportion to size."""
    if stage is not None and stage.weights is not None:
        weights = {w.name: float(w.weight) for w in stage.weights}
    elif any(source.weight is not None for source in data.train or ()):
        given = [float(source.weight or 0) for source in data.train or ()]
        weights = dict(zip(data.names("train"), given, strict=True))
    elif data.mixing_temperature is not None:
        power = 1 / float(data.mixing_temperature)
        weights = {name: tokens**power for name, tokens in sets.items()}
    else:
        return None
    shares = [weights.get(name, 0.0) for name in sets]
    if not any(shares):
        raise UserError(
            "NothingToMix",
            f"spec.{path}: the sets with a weight above 0 ({', '.join(weights)}) have no sample to"
            f" train on; sets with samples: {', '.join(sets)}. Correct the weights or the data",
        )
    return shares


def replay_of(spec: FineTuneJobSpec, sets: Sequence[str]) -> list[bool]:
    """Return which training sets are anchored to the base model's outputs.

    Args:
        sets: names of the sets that have samples, in the order of the plan's sources.

    Raises:
        UserError: 'NothingToReplay' where no set with ``replay: true`` has samples.
    """
    if float(spec.training.anchor.kl_coefficient) == 0:
        return [False] * len(sets)
    sources = zip(spec.data.names("train"), spec.data.train or (), strict=True)
    marked = [name for name, source in sources if source.replay]
    if not set(marked) & set(sets):
        raise UserError(
            "NothingToReplay",
            "spec.training.anchor.klCoefficient: the sets with replay: true"
            f" ({', '.join(marked)}) have no sample to train on; sets with samples:"
            f" {', '.join(sets)}. Correct the marks or the data",
        )
    return [name in marked for name in sets]


def evaluation_steps(spec: FineTuneJobSpec, total: int) -> range:
    """Return the numbers of completed steps after which the validation sets are evaluated. The end
    of the run is always evaluated. ``x in evaluation_steps(...)`` takes constant time."""
    every = spec.evaluation.every_steps or max(1, -(-total // _EVALUATIONS))
    return range(every, total + 1, every)


def log_interval(total: int) -> int:
    """Return the steps between two points of the learning curve: about 100 points, at most ten
    steps apart."""
    return max(1, min(_LOG_INTERVAL_MAX, total // _LOG_POINTS))


def learning_rate(spec: FineTuneJobSpec, total: int, step: int) -> float:
    """Return the learning rate of a step.

    With W = ceil(warmupRatio · total) warm-up steps, step t < W has peak · (t + 1) / W: no step
    is wasted at zero, and the last warm-up step has the peak. From W on, with the progress
    p = (t - W) / (total - W), the rate is peak · (1 + cos πp) / 2 (Cosine; Loshchilov & Hutter
    2017), peak · (1 - p) (Linear) or peak (Constant). Zero would be reached at step ``total``,
    which does not run.
    """
    peak = spec.effective_learning_rate
    warmup = math.ceil(float(spec.training.warmup_ratio) * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    if spec.training.schedule == "Cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * done))
    return peak * (1.0 - done) if spec.training.schedule == "Linear" else peak
