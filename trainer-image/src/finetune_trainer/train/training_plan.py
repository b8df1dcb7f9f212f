"""The plan of a training: on all training samples, or on a part for ``evaluation.dataCurve``.

    index of the training samples (+ positions of a part) ──► Plan, names of its sources

In a training on a part each sample is visited as often as in the whole one: steps, warm-up and
decay shrink with the samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine.planning.plan import Packing, Plan
from finetune_trainer.engine.planning.schedule import stages_of, steps_of, visits_of
from finetune_trainer.prepared.dataset import PreparedData

Positions = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Training:
    """A training, as far as its plan decides it."""

    plan: Plan
    """Positions of its samples are those in the part."""
    total: int
    """Optimizer steps."""
    sources: list[str]
    """Names of the non-empty training sets, in the order of the plan's sources."""


def training_of(
    spec: FineTuneJobSpec, data: PreparedData, ranks: int, packing: Packing,
    micro_batch_tokens: int, part: Positions | None = None,
) -> Training:  # fmt: skip
    """Return the training of a spec.

    Args:
        ranks: as in ``Plan``, as the arguments after it.
        part: positions of the samples in the index of the training samples; None: all.

    Raises:
        UserError: as ``stages_of``.
    """
    index = data.index("train")
    length, supervised, of_set = index.length, index.supervised, index.set
    if part is not None:
        spec = _spec_of(spec, len(part), len(index))
        length, supervised, of_set = length[part], supervised[part], of_set[part]
    numbers = [number for number, _ in data.set_names("train")]
    total = steps_of(spec, len(length))
    # Of the whole sets also for a part: a mixture by size is that of the whole training.
    tokens = {entry.name: entry.tokens for entry in map(data.manifest.sets.__getitem__, numbers)}
    plan = Plan(
        length, supervised,
        sources=np.searchsorted(numbers, of_set),
        stages=stages_of(spec, tokens, total),
        batch_size=spec.training.batch_size, visits=visits_of(spec, len(length)),
        seed=spec.training.seed, micro_batch_tokens=micro_batch_tokens, ranks=ranks,
        packing=packing, virtual_tokens=spec.method.virtual_tokens,
    )  # fmt: skip
    return Training(plan, total, list(tokens))


def _spec_of(spec: FineTuneJobSpec, samples: int, of: int) -> FineTuneJobSpec:
    """Return the spec of a training on some of the samples; epochs need no change."""
    if spec.training.max_steps is None:
        return spec
    steps = -(-spec.training.max_steps * samples // of)
    training = spec.training.model_copy(update={"max_steps": steps})
    return spec.model_copy(update={"training": training})


def part_of(sources: Positions, share: float, seed: int) -> npt.NDArray[np.int64]:
    """Return the positions of a part of the training samples, ascending: the same share of each
    source, at least one sample. A smaller share is within a larger one.

    Args:
        sources: source of each sample, shape [samples].
        seed: of the choice.
    """
    chosen = []
    for source in np.unique(sources).tolist():
        own = np.flatnonzero(sources == source)
        order = np.random.default_rng([seed, source]).permutation(own)
        chosen.append(order[: math.ceil(share * len(own))])
    return np.sort(np.concatenate(chosen))
