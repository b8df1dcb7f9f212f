"""Spec rules derived from the table of tasks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from finetune_api.base import Rule, is_zero
from finetune_api.methods import METHODS
from finetune_api.sources import DATA_LISTS
from finetune_api.tasks import TASKS, TaskName


def task_rules() -> tuple[Rule, ...]:
    """Return the rules of all tasks that restrict other fields."""
    return tuple(r for name, kind in TASKS.items() if not kind.generates for r in _rules(name))


def _rules(task: TaskName) -> list[Rule]:
    kind = TASKS[task]

    def rule(
        cel: str, message: str, holds: Callable[[Any], bool], got: Sequence[str] = ("task",)
    ) -> Rule:
        return Rule(
            f"self.task != '{task}' || ({cel})",
            f"task {task} {message}",
            lambda spec: spec.task != task or holds(spec),
            tuple(got),
        )

    types = [name for name, method in METHODS.items() if task in method.tasks]
    formats, metrics = json.dumps(kind.formats), json.dumps(kind.metrics)
    fitting = f"all(s, !has(s.format) || s.format in {formats})"
    measured = f"is measured by {', '.join(kind.metrics)}"
    return [
        rule(
            f"self.method.type in {json.dumps(types)}",
            f"needs method.type {', '.join(types)}",
            lambda s: s.method.type in types,
            ("method.type",),
        ),
        rule(
            " && ".join(f"(!has(self.data.{x}) || self.data.{x}.{fitting})" for x in DATA_LISTS),
            f"needs data of format {', '.join(kind.formats)}",
            lambda s: all(source.format in (None, *kind.formats) for source in s.data.sources()),
        ),
        rule(
            f"!has(self.evaluation.metrics) || self.evaluation.metrics.all(m, m in {metrics})",
            f"{measured}: correct evaluation.metrics",
            lambda s: set(s.evaluation.metrics or ()) <= set(kind.metrics),
            ("evaluation.metrics",),
        ),
        rule(
            f"self.checkpoint.metric in {metrics}",
            f"{measured}: correct checkpoint.metric",
            lambda s: s.checkpoint.metric in kind.metrics,
            ("checkpoint.metric",),
        ),
        rule(
            f"!has(self.training.earlyStopping) || self.training.earlyStopping.metric in {metrics}",
            f"{measured}: correct training.earlyStopping.metric",
            lambda s: (
                s.training.early_stopping is None
                or s.training.early_stopping.metric in kind.metrics
            ),
            ("training.earlyStopping.metric",),
        ),
        rule(
            "!has(self.evaluation.maxNewTokens)",
            "generates no text: remove evaluation.maxNewTokens",
            lambda s: s.evaluation.max_new_tokens is None,
            ("evaluation.maxNewTokens",),
        ),
        rule(
            is_zero("self.training.routerAuxLossCoefficient"),
            "has no router loss: remove training.routerAuxLossCoefficient",
            lambda s: float(s.training.router_aux_loss_coefficient) == 0,
            ("training.routerAuxLossCoefficient",),
        ),
        rule(
            is_zero("self.training.anchor.klCoefficient"),
            "begins with an untrained head, so there are no outputs to keep: remove"
            " training.anchor.klCoefficient",
            lambda s: float(s.training.anchor.kl_coefficient) == 0,
            ("training.anchor.klCoefficient",),
        ),
        rule(
            "!has(self.evaluation.remedy)",
            "begins with an untrained head, which is no model to go back to: remove"
            " evaluation.remedy",
            lambda s: s.evaluation.remedy is None,
            ("evaluation.remedy.scan",),
        ),
        rule(
            "!has(self.evaluation.judge)",
            "has no answers in words to judge: remove evaluation.judge",
            lambda s: s.evaluation.judge is None,
            ("evaluation.judge.endpoint",),
        ),
        rule(
            "self.training.tokenWeighting == 'None'",
            "has no tokens to weight: remove training.tokenWeighting",
            lambda s: s.training.token_weighting == "None",
            ("training.tokenWeighting",),
        ),
        rule(
            "self.compute.contextParallel == 1",
            "does not support context parallelism: set compute.contextParallel: 1",
            lambda s: s.compute.context_parallel == 1,
            ("compute.contextParallel",),
        ),
        rule(
            "!self.training.compile",
            "has micro-batches of many shapes: set training.compile to false",
            lambda s: not s.training.compile,
        ),
        rule(
            "!has(self.method.lora) || self.method.lora.initialization != 'PiSSA'",
            "needs method.lora.initialization Default",
            lambda s: s.method.effective_lora.initialization == "Default",
            ("method.lora.initialization",),
        ),
    ]
