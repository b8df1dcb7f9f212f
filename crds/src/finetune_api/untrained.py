"""Spec rules of methods that do not train (``MethodKind.trains``): what they must measure, and
which fields nothing would read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from finetune_api.base import Model, Rule, is_zero
from finetune_api.gates import COMPARING
from finetune_api.methods import METHODS
from finetune_api.training import Training

_TYPES: Final = [name for name, kind in METHODS.items() if not kind.trains]
_NAMES: Final = ", ".join(_TYPES)
_READ: Final = ("max_length", "micro_batch_tokens", "precision")
"""Fields of ``training`` that evaluation reads."""


def untrained_rules(checkpoint: type[Model]) -> tuple[Rule, ...]:
    """Return the rules of a spec whose method does not train, and what the others need.

    Args:
        checkpoint: model of ``spec.checkpoint``.
    """

    def rule(cel: str, message: str, holds: Callable[[Any], bool], got: Sequence[str] = ()) -> Rule:
        return Rule(
            f"!(self.method.type in {json.dumps(_TYPES)}) || ({cel})",
            f"method.type {_NAMES} {message}",
            lambda spec: spec.method.kind.trains or holds(spec),
            tuple(got),
        )

    read = ", ".join(f"training.{Training.model_fields[name].alias}" for name in _READ)
    comparing = list(COMPARING)
    return (
        Rule(
            f"has(self.data.train) || self.method.type in {json.dumps(_TYPES)}",
            f"there is nothing to train on: give data.train, or set method.type: {_NAMES} to"
            " evaluate the model as it is",
            lambda s: s.data.train is not None or not s.method.kind.trains,
            ("method.type",),
        ),
        rule(
            "has(self.data.test) || has(self.data.retention)"
            f" || (has(self.data.train) && !{is_zero('self.data.split.test')})",
            "has nothing to measure: give data.test or data.retention, or data.train with a"
            " data.split.test above 0",
            lambda s: bool(
                s.data.test or s.data.retention or (s.data.train and float(s.data.split.test) > 0)
            ),
        ),
        rule(
            "has(self.data.train)"
            " || !(has(self.evaluation.baselines.shots)"
            " && self.evaluation.baselines.shots.size() > 0)"
            " && !(has(self.evaluation.baselines.prompts)"
            " && self.evaluation.baselines.prompts.exists(p, p.shots > 0))",
            "draws examples (evaluation.baselines: shots) from training sets: give data.train, or"
            " remove the shots",
            lambda s: (
                s.data.train is not None
                or (
                    not s.evaluation.baselines.shots
                    and not any(p.shots for p in s.evaluation.baselines.prompts)
                )
            ),
        ),
        rule(
            "!has(self.data.validation) && !has(self.data.stages)"
            " && !has(self.data.mixingTemperature) && (!has(self.data.train)"
            " || self.data.train.all(t, !has(t.weight) && !t.replay && !t.canaries))",
            "neither trains nor validates: remove data.validation, stages, mixingTemperature, and"
            " weight, replay and canaries of data.train",
            lambda s: (
                (s.data.validation, s.data.stages, s.data.mixing_temperature) == (None,) * 3
                and not any(t.weight or t.replay or t.canaries for t in s.data.train or ())
            ),
        ),
        rule(
            " && ".join(_defaults_in_cel(Training, "self.training", _READ)),
            f"takes no step, and reads of training only {read}: remove the other fields",
            lambda s: _has_defaults(s.training, _READ),
        ),
        rule(
            " && ".join(_defaults_in_cel(checkpoint, "self.checkpoint")),
            "has no training state to save: remove checkpoint",
            lambda s: _has_defaults(s.checkpoint),
        ),
        rule(
            "!has(self.evaluation.everySteps) && self.evaluation.artefactCheck == 'Sample'",
            "takes no step and publishes no model: remove evaluation.everySteps and artefactCheck",
            lambda s: s.evaluation.every_steps is None and s.evaluation.artefact_check == "Sample",
        ),
        rule(
            "!has(self.evaluation.gates)"
            f" || !self.evaluation.gates.exists(g, g.operator in {comparing})",
            "has no tuned model that gates could compare: use AtLeast or AtMost",
            lambda s: not any(g.operator in COMPARING for g in s.evaluation.gates),
            ("evaluation.gates[].operator",),
        ),
        rule(
            "!has(self.evaluation.judge) && !self.evaluation.dataCurve",
            "has no tuned model that a judge or a data curve could compare: remove evaluation.judge"
            " and dataCurve",
            lambda s: s.evaluation.judge is None and not s.evaluation.data_curve,
        ),
        rule(
            "!has(self.output.current)",
            "publishes no model that could come into use: remove output.current",
            lambda s: s.output.current is None,
        ),
        rule(
            "self.compute.contextParallel == 1",
            "runs each sample in one process: set compute.contextParallel: 1",
            lambda s: s.compute.context_parallel == 1,
            ("compute.contextParallel",),
        ),
    )


def _has_defaults(block: Model, read: Sequence[str] = ()) -> bool:
    """Whether all fields of a block except those in ``read`` have their defaults."""
    fields = type(block).model_fields
    return all(getattr(block, name) == fields[name].default for name in fields if name not in read)


def _defaults_in_cel(block: type[Model], path: str, read: Sequence[str] = ()) -> Iterator[str]:
    """As ``_has_defaults``, as CEL terms. The API server has filled in the defaults."""
    for name, field in block.model_fields.items():
        where = f"{path}.{field.alias}"
        if name in read:
            continue
        if isinstance(field.default, Model):
            yield from _defaults_in_cel(type(field.default), where)
        elif field.default is None:
            yield f"!has({where})"
        else:
            yield f"{where} == {json.dumps(field.default)}"
