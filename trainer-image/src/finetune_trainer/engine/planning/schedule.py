"""How many steps a training takes, and what happens at each: pure functions of the spec.

Steps are counted from 0: step *t* is the one that is taken when *t* optimizer steps are done.
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
"""Evaluations over a run whose spec names no cadence."""

_LOG_POINTS: Final = 100
_LOG_INTERVAL_MAX: Final = 10


def steps_of(spec: FineTuneJobSpec, train_samples: int) -> int:
    """Optimizer steps of a run. Batches go on over the ends of epochs; the last one of the run is
    trained as it is, however short. A batch never has more samples than there are."""
    visits = visits_of(spec, train_samples)
    if visits is None:
        assert spec.training.max_steps is not None, "maxSteps decides where epochs do not"
        return spec.training.max_steps
    return -(-visits // min(spec.training.batch_size, train_samples))


def visits_of(spec: FineTuneJobSpec, train_samples: int) -> int | None:
    """Samples that a run trains, each visit counted; None where ``training.maxSteps`` decides."""
    epochs = spec.effective_epochs
    return None if epochs is None else epochs * train_samples


def stages_of(spec: FineTuneJobSpec, sets: Mapping[str, int], total: int) -> list[Stage]:
    """What is mixed when.

    Args:
        sets: tokens of each training set, by name, in the order of the plan's sources.
        total: steps of the run.

    Raises:
        UserError: 'NothingToMix' where all sets that a stage would mix are empty; 'StageTooShort'
            where a stage has no step.
    """
    if spec.data.stages is None:
        return [Stage(total, _shares(spec.data, None, sets, "data.train"))]
    parts = [Fraction(stage.steps) for stage in spec.data.stages]
    # Exact, and halves up: a stage whose share is a whole step then always has one.
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
    """The stages in words and numbers; none where the spec names none.

    Args:
        sets: as of ``stages_of``, which made the stages.
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
    """Shares of the tokens by set; None: in proportion to size."""
    if stage is not None and stage.weights is not None:
        weights = {w.name: float(w.weight) for w in stage.weights}
    elif data.train[0].weight is not None:
        given = [float(source.weight or 0) for source in data.train]
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
            f" train on; those that have are {', '.join(sets)}. Correct the weights or the data",
        )
    return shares


def replay_of(spec: FineTuneJobSpec, sets: Sequence[str]) -> list[bool]:
    """Which training sets are held to the untuned model's outputs.

    Args:
        sets: names of those that have samples, in the order of the plan's sources.

    Raises:
        UserError: 'NothingToReplay' where none of those that should be has samples.
    """
    if float(spec.training.anchor.kl_coefficient) == 0:
        return [False] * len(sets)
    sources = zip(spec.data.names("train"), spec.data.train, strict=True)
    marked = [name for name, source in sources if source.replay]
    if not set(marked) & set(sets):
        raise UserError(
            "NothingToReplay",
            "spec.training.anchor.klCoefficient: the sets with replay: true"
            f" ({', '.join(marked)}) have no sample to train on; those that have are"
            f" {', '.join(sets)}. Correct the marks or the data",
        )
    return [name in marked for name in sets]


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
