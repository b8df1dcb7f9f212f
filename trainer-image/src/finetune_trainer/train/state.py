"""What the training loop must not forget: carried by every checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from torch import Tensor

from finetune_api.tasks import Metric
from finetune_trainer.engine.guard import Skipped
from finetune_trainer.storage.runfiles import CurvePoint, ValidationPoint


@dataclass(frozen=True)
class Figures:
    """Means over the steps that were taken since the last log point."""

    loss: float
    """Of the batches, per supervised token."""
    by_source: list[float | None]
    """Of the tokens of each source; None: there were none."""
    anchor_kl: float | None
    """Divergence per anchored token; None: there were none."""
    router: float
    """Router loss, by tokens; 0 where it is not asked for."""


_UNSAVED: Final = ("local", "unjudged")


@dataclass
class LoopState:
    """What the loop must not forget: a few integers, the curves, and the loss not yet logged."""

    step: int = 0
    """Steps done: the next step to do."""
    logged: int = 0
    """Step of the last log point."""
    pending: list[float] = field(default_factory=list)
    """Sums over the gang and over the steps since, as committed: losses of the batches (mean per
    supervised token), steps taken, summed divergence and anchored tokens, router losses of the
    batches, then by source summed losses and supervised tokens."""
    guard: list[float] = field(default_factory=list)
    """What the guard must not forget."""
    skipped: list[Skipped] = field(default_factory=list)
    """Steps in a row whose update was not made, up to the last one."""
    skipped_steps: int = 0
    """All of them."""
    tokens: int = 0
    """Tokens of the steps that were done, less those of the steps that are known to be skipped."""
    curve: list[CurvePoint] = field(default_factory=list)
    validation: list[ValidationPoint] = field(default_factory=list)
    watched_best: float | None = None
    """Best value of the early-stopping metric."""
    without_improvement: int = 0
    """Evaluations since."""
    stopped_early: bool = False
    local: Tensor | None = None
    """This rank's sums since the last log point or commit, on the device; never saved."""
    unjudged: dict[int, int] = field(default_factory=dict)
    """Tokens of the steps whose verdict was not asked for yet; never saved: commits ask."""

    def advance(self, sums: Tensor, tokens: int) -> None:
        """A step was done, with these sums on this rank."""
        self.unjudged[self.step] = tokens
        self.step += 1
        self.tokens += tokens
        self.local = sums if self.local is None else self.local + sums

    def gather(self, total: Callable[[Tensor], Tensor]) -> None:
        """Add the ranks' sums to ``pending``, alike on all of them; waits for the device."""
        if self.local is None:  # on all ranks: they have done the same steps
            return
        sums = total(self.local.cpu()).tolist()
        before = self.pending or [0.0] * len(sums)
        self.pending = [a + b for a, b in zip(before, sums, strict=True)]
        self.local = None

    def take_figures(self, total: Callable[[Tensor], Tensor]) -> Figures | None:
        """What was gathered since the last log point (None: no step was taken); it begins anew."""
        self.gather(total)
        sums, self.pending, self.logged = self.pending, [], self.step
        if not sums or not sums[1]:
            return None
        loss, taken, drift, anchored, router, *sources = sums
        half = len(sources) // 2
        counts = zip(sources[:half], sources[half:], strict=True)
        return Figures(
            loss=loss / taken,
            by_source=[a / n if n else None for a, n in counts],
            anchor_kl=drift / anchored if anchored else None,
            router=router / taken,
        )

    def note_skipped(self, found: list[Skipped]) -> list[Skipped]:
        """Of the steps done since this was called last, these were not taken: nothing was learned
        of their tokens. Returns the longest row of such, up to now."""
        self.skipped_steps += len(found)
        self.tokens -= sum(self.unjudged.get(skipped.step, 0) for skipped in found)
        self.unjudged = {}
        streaks: list[list[Skipped]] = [[]]
        for skipped in (*self.skipped, *found):
            if streaks[-1] and skipped.step != streaks[-1][-1].step + 1:
                streaks.append([])
            streaks[-1].append(skipped)
        last = streaks[-1]
        self.skipped = last if last and last[-1].step == self.step - 1 else []
        return max(streaks, key=len)

    def metric_at(self, step: int, metric: Metric) -> float | None:
        """Value of a validation metric at a step, where it was measured there."""
        if not self.validation or self.validation[-1].step != step:
            return None
        return self.validation[-1].overall.get(metric)

    def to_json(self) -> str:
        raw: dict[str, Any] = {k: v for k, v in self.__dict__.items() if k not in _UNSAVED}
        raw["curve"] = [p.to_json() for p in self.curve]
        raw["validation"] = [p.to_json() for p in self.validation]
        return json.dumps(raw)

    @classmethod
    def from_json(cls, text: str) -> LoopState:
        raw = json.loads(text)
        raw["skipped"] = [Skipped(*skipped) for skipped in raw["skipped"]]
        raw["curve"] = [CurvePoint.model_validate(p) for p in raw["curve"]]
        raw["validation"] = [ValidationPoint.model_validate(p) for p in raw["validation"]]
        return cls(**raw)
