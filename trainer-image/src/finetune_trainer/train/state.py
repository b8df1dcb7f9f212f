"""What the training loop must not forget: carried by every commit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from finetune_api.spec import Metric
from finetune_trainer.engine.plan import Step
from finetune_trainer.failures import Diverged
from finetune_trainer.storage.runfiles import CurvePoint, ValidationPoint


@dataclass
class LoopState:
    """What the loop must not forget: a few integers, the curves, and the loss not yet logged."""

    step: int = 0
    """Steps done: the next step to do."""
    logged: int = 0
    """Step of the last log point."""
    pending: list[float] = field(default_factory=list)
    """Losses of the steps since, as committed, summed over the gang: of the batches (mean per
    supervised token), then of the tokens of each source."""
    supervised: list[float] = field(default_factory=list)
    """Supervised tokens of the steps since, by source."""
    tokens: int = 0
    """Tokens trained."""
    curve: list[CurvePoint] = field(default_factory=list)
    validation: list[ValidationPoint] = field(default_factory=list)
    watched_best: float | None = None
    """Best value of the early-stopping metric."""
    without_improvement: int = 0
    """Evaluations since."""
    stopped_early: bool = False
    rng: str = ""
    """State of torch's CPU generator in the first rank, hexadecimal. What the loop draws is keyed
    by seed, step and sample; this is for what a model draws by itself."""
    local: Tensor | None = None
    """This rank's losses since the last log point or commit, on the device; never saved."""

    def advance(self, losses: Tensor, step: Step) -> None:
        """A step was done, with these parts of its losses on this rank (as ``pending``)."""
        self.step += 1
        self.tokens += step.tokens
        self.local = losses if self.local is None else self.local + losses
        before = self.supervised or [0.0] * len(step.by_source)
        self.supervised = [a + b for a, b in zip(before, step.by_source, strict=True)]

    def gather(self, total: Callable[[Tensor], Tensor]) -> None:
        """Sum the ranks' pending losses into ``pending``, alike on all of them."""
        if self.local is None:  # on all ranks: they have done the same steps
            return
        sums = total(self.local.cpu()).tolist()
        before = self.pending or [0.0] * len(sums)
        self.pending = [a + b for a, b in zip(before, sums, strict=True)]
        self.local = None

    def take_losses(self, total: Callable[[Tensor], Tensor]) -> tuple[float, list[float | None]]:
        """Mean loss since the last log point, and that of each source (None: it had no token);
        they begin anew."""
        self.gather(total)
        steps = self.step - self.logged
        if not steps or not self.pending:
            return (self.curve[-1].loss if self.curve else math.nan), []
        batches, *sources = self.pending
        counts = self.supervised
        self.pending, self.supervised = [], []
        by_source = [a / n if n else None for a, n in zip(sources, counts, strict=True)]
        return batches / steps, by_source

    def check_finite(self, total: Callable[[Tensor], Tensor]) -> None:
        """Refuse to commit a state whose losses were no numbers.

        Raises:
            Diverged: on all ranks together.
        """
        self.gather(total)
        if self.pending and not math.isfinite(self.pending[0]):
            raise Diverged(
                "LossNotFinite",
                f"the training loss became {self.pending[0]} between steps {self.logged} and"
                f" {self.step}. Lower training.learningRate or raise training.warmupRatio; the"
                " commits before are kept",
            )

    def metric_at(self, step: int, metric: Metric) -> float | None:
        """Value of a validation metric at a step, where it was measured there."""
        if not self.validation or self.validation[-1].step != step:
            return None
        return self.validation[-1].overall.get(metric)

    def to_json(self) -> str:
        raw: dict[str, Any] = {k: v for k, v in self.__dict__.items() if k != "local"}
        raw["curve"] = [p.to_json() for p in self.curve]
        raw["validation"] = [p.to_json() for p in self.validation]
        return json.dumps(raw)

    @classmethod
    def from_json(cls, text: str) -> LoopState:
        raw = json.loads(text)
        raw["curve"] = [CurvePoint.model_validate(p) for p in raw["curve"]]
        raw["validation"] = [ValidationPoint.model_validate(p) for p in raw["validation"]]
        return cls(**raw)
