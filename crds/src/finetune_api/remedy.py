"""``spec.evaluation.remedy``: a point between the base and the tuned weights, and its results."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from finetune_api.base import DecimalString, Fraction, Model, Record, Rule, Word, is_one, is_zero
from finetune_api.methods import METHODS

Scan = Literal["Interpolation", "LayerLinear"]


class Remedy(Model):
    """A choice among points between the base model (0) and the tuned model (1)."""

    scan: Scan
    """Interpolation: weights = base + point * (tuned - base) (WiSE-FT; Wortsman et al. 2022,
    arXiv:2109.01903); of an adapter this is its scale. LayerLinear: the factor grows linearly with
    the depth, from the point in the first block and the embeddings to 1 in the last block and the
    head (LiNeS; Wang et al. 2024, arXiv:2410.17146)."""
    points: Annotated[list[Fraction], Field(min_length=1, max_length=16)] = (
        ["0.8", "0.6", "0.4", "0.2"]
    )  # fmt: skip
    """Points besides 1 that may be chosen, above 0 and below 1."""
    worsens_at_most: DecimalString = "0.02"
    """Limit of a retention set without a gate: the largest loss, in nats per supervised token, that
    the 95 % confidence interval of the comparison with the base model may leave possible. A set
    with a gate WorsensAtMost on its Loss against Base has the gate's value."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            f"!has(self.points) || !self.points.exists(p, {is_zero('p')} || {is_one('p')})",
            "points lie between the base model (0) and the tuned model (1): give numbers above 0"
            " and below 1; 1 is always measured",
            lambda r: all(0 < float(p) < 1 for p in r.points),
            ("points",),
        ),
    )

    @property
    def effective_points(self) -> list[float]:
        """All points that may be chosen, from the tuned model on."""
        return sorted({1.0, *map(float, self.points)}, reverse=True)


def remedy_rules() -> tuple[Rule, ...]:
    """Return the rules of what the remedy requires of a spec."""
    types = [name for name, kind in METHODS.items() if kind.mixes]

    def rule(cel: str, message: str, holds: Callable[[Any], bool], *got: str) -> Rule:
        return Rule(
            f"!has(self.evaluation.remedy) || ({cel})",
            f"evaluation.remedy {message}",
            lambda spec: spec.evaluation.remedy is None or holds(spec),
            ("evaluation.remedy.scan", *got),
        )

    return (
        rule(
            "has(self.data.retention)",
            "chooses by retention sets: give data.retention",
            lambda s: s.data.retention is not None,
        ),
        rule(
            f"has(self.data.validation) || !{is_zero('self.data.split.validation')}",
            "chooses by the validation loss: give data.validation or a data.split.validation above"
            " 0",
            lambda s: s.data.validation is not None or float(s.data.split.validation) > 0,
            "data.split.validation",
        ),
        rule(
            f"self.method.type in {json.dumps(types)}",
            f"goes with method.type {', '.join(types)}: without training there is no tuned"
            " model, and virtual tokens at a point between nothing and themselves are no mixture",
            lambda s: s.method.kind.mixes,
            "method.type",
        ),
        rule(
            "!has(self.method.lora) || !self.method.lora.useDora",
            "does not go with method.lora.useDora, whose norms depend on the adapter: a point is no"
            " mixture of the two models; set useDora: false",
            lambda s: not s.method.effective_lora.use_dora,
        ),
    )


class RetentionChange(Record):
    """A point on the choosing half of a retention set."""

    data_set: Word
    """Name of the set."""
    loss: float | None = None
    """Its loss, in nats per supervised token; None: not finite."""
    change: float | None = None
    """Loss minus that of the base model."""
    low: float | None = None
    """Lower end of the change's 95 % confidence interval."""
    high: float | None = None
    """Upper end: at most the set's limit, or the point does not qualify."""


class RemedyPoint(Record):
    """A point between the base and the tuned model."""

    point: float
    """From 0, the base model, to 1, the tuned model."""
    validation_loss: float | None = None
    """Loss over all validation sets, in nats per supervised token; None: not finite."""
    retention: list[RetentionChange]
    """One for each retention set."""
    qualifies: bool
    """Whether no retention set worsens by more than its limit."""


class RemedyResult(Record):
    """What the remedy has measured and chosen."""

    scan: Word
    """``Remedy.scan``."""
    limits: dict[Word, float]
    """Largest loss that must be ruled out, in nats, by retention set."""
    points: list[RemedyPoint]
    """From the tuned to the base model."""
    chosen: float | None = None
    """Point of the run's model; None: no point qualifies, so it is the tuned model."""
    because: str
    """The figures, in words."""
