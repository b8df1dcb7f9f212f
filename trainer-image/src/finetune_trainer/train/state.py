"""What the training loop must not forget: carried by every commit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from finetune_api.spec import Metric
from finetune_trainer.failures import Diverged
from finetune_trainer.storage.runfiles import CurvePoint, ValidationPoint


@dataclass
class LoopState:
    """What the loop must not forget: a few integers, the curves, and the loss not yet logged."""

    step: int = 0
    """Steps done: the next step to do."""
    logged: int = 0
    """Step of the last log point."""
    pending: float = 0.0
    """Sum over the gang of the losses of the steps since, as committed."""
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

    def advance(self, loss: Tensor, tokens: int) -> None:
        """A step was done, with this part of its loss on this rank."""
        self.step += 1
        self.tokens += tokens
        self.local = loss if self.local is None else self.local + loss

    def gather(self, total: Callable[[Tensor], Tensor]) -> None:
        """Sum the ranks' pending losses into ``pending``, alike on all of them."""
        local = torch.zeros(1, dtype=torch.float64)
        if self.local is not None:
            local += self.local.cpu()
        self.pending += float(total(local).item())
        self.local = None

    def take_loss(self, total: Callable[[Tensor], Tensor]) -> float:
        """Mean loss since the last log point; it begins anew."""
        self.gather(total)
        steps = self.step - self.logged
        loss = self.pending / steps if steps else (self.curve[-1].loss if self.curve else math.nan)
        self.pending = 0.0
        return loss

    def check_finite(self, total: Callable[[Tensor], Tensor]) -> None:
        """Refuse to commit a state whose losses were no numbers.

        Raises:
            Diverged: on all ranks together.
        """
        self.gather(total)
        if not math.isfinite(self.pending):
            raise Diverged(
                "LossNotFinite",
                f"the training loss became {self.pending} between steps {self.logged} and"
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
