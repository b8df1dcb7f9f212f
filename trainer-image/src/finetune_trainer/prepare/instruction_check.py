"""Refuses metric InstructionFollowing where prompts have no instructions that a program checks,
before GPUs are held for it."""

from __future__ import annotations

import logging
from typing import Final

import numpy as np

from finetune_api.spec import FineTuneJobSpec
from finetune_api.tasks import OF_BUILT_IN
from finetune_trainer.evaluate.metric_selection import measured_on
from finetune_trainer.failures import UserError
from finetune_trainer.instructions.checks import has_instructions
from finetune_trainer.prepared.dataset import PreparedData
from finetune_trainer.prepared.split import TESTED

log = logging.getLogger(__name__)


def check_instructions(spec: FineTuneJobSpec, data: PreparedData) -> None:
    """Check the sets of the user's own that the metric is wanted on.

    Raises:
        UserError: 'GateNotMeasured', a gate needs the metric on a set that cannot have it;
            'MetricWithoutData', no set that it was asked for can have it.
    """
    lacking = {
        name: f"the prompt of its sample {at + 1} has none"
        for name, at in _without_instructions(spec, data).items()
    }
    for name, why in lacking.items():
        for number, gate in enumerate(spec.evaluation.gates):
            if gate.metric == OF_BUILT_IN and gate.data_set in (None, name):
                raise UserError(
                    "GateNotMeasured",
                    f"spec.evaluation.gates[{number}].metric: {OF_BUILT_IN} is not measured on"
                    f" {name}: {why}. {_NEEDED}",
                )
        log.warning("set %s has no %s: %s", name, OF_BUILT_IN, why)
    tested = [each for each in data.manifest.sets if each.split in TESTED]
    having = [each for each in tested if OF_BUILT_IN in measured_on(each, spec)]
    if lacking and all(each.name in lacking for each in having):
        first, why = next(iter(lacking.items()))
        raise UserError(
            "MetricWithoutData",
            f"spec.evaluation.metrics: no set has {OF_BUILT_IN}; set {first}: {why}. {_NEEDED}",
        )


_NEEDED: Final = (
    "Every prompt of a set must have instructions in the words of builtin://instructions.jsonl; use"
    " that set, or another metric"
)


def _without_instructions(spec: FineTuneJobSpec, data: PreparedData) -> dict[str, int]:
    """Position in its set of the first prompt without instructions, of each set that has one among
    the samples that are answered."""
    found = {}
    for side in TESTED:
        for number, name in data.set_names(side):
            entry = data.manifest.sets[number]
            if entry.built_in or OF_BUILT_IN not in measured_on(entry, spec):
                continue
            positions = np.flatnonzero(data.index(side).set == number)
            asked = data.references(side, positions[: spec.evaluation.max_samples].tolist())
            lacking = (n for n, each in enumerate(asked) if not has_instructions(each.prompt))
            if (first := next(lacking, None)) is not None:
                found[name] = first
    return found
