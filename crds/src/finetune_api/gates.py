"""``spec.evaluation.gates``: conditions on the results, and ``spec.output.current``."""

from __future__ import annotations

from typing import ClassVar, Final, Literal

from finetune_api.base import DecimalString, DnsLabel, Model, Rule
from finetune_api.custom_metrics import MetricName
from finetune_api.tasks import metrics_from

GateOperator = Literal["AtLeast", "AtMost", "BetterThan", "WorsensAtMost"]
GateRow = Literal["Base", "FewShot", "Prompt", "Retrieval", "Current"]
COMPARING: Final[tuple[GateOperator, ...]] = ("BetterThan", "WorsensAtMost")
"""Operators that compare the tuned model with another row."""
_ASKED: Final[tuple[GateRow, ...]] = ("FewShot", "Prompt", "Retrieval")
_OF_LOSS: Final = list(metrics_from("Loss"))


class Gate(Model):
    """A condition on the tuned model's results, or with method.type None on the base model's. A run
    that misses one is held: it completes and is published, marked as held, and CURRENT.json does
    not name it."""

    data_set: DnsLabel | None = None
    """Name of a test or retention set. Absent: every test set."""
    metric: MetricName
    """A metric that the set has: of evaluation.metrics or evaluation.customMetrics."""
    operator: GateOperator
    """AtLeast, AtMost: of the model's value. BetterThan: the tuned model is significantly
    better than `row`, by more than `value`. WorsensAtMost: the 95 % confidence interval of the
    comparison with `row` rules out that the tuned model is worse by more than `value`."""
    value: DecimalString | None = None
    """In the unit of the metric: "0.85" for Accuracy, "1.7" for Loss (nats), "35" for Bleu.
    BetterThan may leave it out: then its verdict must be Better, significantly, with a gain of
    evaluation.minEffect not ruled out."""
    row: GateRow | None = None
    """What the tuned model is compared with, over the same samples. Base: the base model.
    FewShot: its answers behind examples (the best of evaluation.baselines.shots). Prompt: behind
    a prompt of evaluation.baselines.prompts (the best). Retrieval: behind passages. Current: the
    model that CURRENT.json names; passed where there is none yet. Absent: Base."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "has(self.value) || self.operator == 'BetterThan'",
            "AtLeast, AtMost and WorsensAtMost need a value",
            lambda g: g.value is not None or g.operator == "BetterThan",
            ("operator",),
        ),
        Rule(
            f"!has(self.row) || self.operator in {list(COMPARING)}",
            "AtLeast and AtMost compare with value alone: remove row",
            lambda g: g.row is None or g.operator in COMPARING,
            ("row",),
        ),
        Rule(
            f"self.metric != 'Perplexity' || !(self.operator in {list(COMPARING)})",
            "Perplexity follows from Loss, by which models are compared: use Loss",
            lambda g: g.metric != "Perplexity" or g.operator not in COMPARING,
            ("metric",),
        ),
        Rule(
            f"!has(self.row) || !(self.row in {list(_ASKED)}) || !(self.metric in {_OF_LOSS})",
            f"rows {', '.join(_ASKED)} have answers, and no losses: use a metric of answers",
            lambda g: g.row not in _ASKED or g.metric not in _OF_LOSS,
            ("row",),
        ),
    )

    @property
    def effective_row(self) -> GateRow | None:
        """The row that the tuned model is compared with; None: with a value alone."""
        return (self.row or "Base") if self.operator in COMPARING else None

    @property
    def effective_value(self) -> float:
        return float(self.value or 0)


class CurrentModel(Model):
    """The model in use: `<destination>/CURRENT.json` names it."""

    margin: DecimalString | None = None
    """A run replaces the current model if it passes evaluation.gates and is not worse by more than
    this many points, in each test set's main metric (the first that it has of Accuracy,
    LabelAccuracy, NumberMatch, ChoiceMatch, JsonFieldF1, Rouge, ExactMatch, TokenF1, Bleu, those of
    evaluation.customMetrics, and Loss) over the samples that both have answered: the 95 %
    confidence interval of the difference rules it out. Points as in evaluation.minEffect, which is
    the default."""
