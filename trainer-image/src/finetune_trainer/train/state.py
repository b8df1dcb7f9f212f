"""State of the training loop that every checkpoint stores."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from finetune_api.tasks import Metric
from finetune_trainer.engine.guard import Skipped
from finetune_trainer.storage.runfiles import CurvePoint, ValidationPoint
from finetune_trainer.train.suspects import FirstVisits, Suspects


@dataclass(frozen=True)
class Figures:
    """Means over the steps taken (not skipped) since the last log point."""

    loss: float
    """Mean over batches of the loss per supervised token."""
    by_source: list[float | None]
    """Loss per supervised token of each source; None: no tokens."""
    anchor_kl: float | None
    """KL divergence per anchored token; None: no tokens."""
    router: float
    """Router loss, weighted by tokens; 0 if it is not trained."""


_UNSAVED: Final = ("local", "visits", "unchecked")


@dataclass
class LoopState:
    """Progress, curves and sums not yet logged; saved with every checkpoint."""

    step: int = 0
    """Steps done, which is the index of the next step."""
    logged: int = 0
    """Step of the last log point."""
    pending: list[float] = field(default_factory=list)
    """Sums over all ranks and the steps since the last log point: batch losses (mean per supervised
    token), steps taken, KL divergence and anchored tokens, router losses of the batches, then
    per-source losses and per-source supervised tokens. Shape [5 + 2 * sources]."""
    guard: list[float] = field(default_factory=list)
    """Statistics of the guard."""
    skipped: list[Skipped] = field(default_factory=list)
    """Consecutive skipped steps that end with the last step; empty if that step was taken."""
    skipped_steps: int = 0
    """Skipped steps of the run."""
    tokens: int = 0
    """Tokens of the steps done, without those of steps known to be skipped."""
    curve: list[CurvePoint] = field(default_factory=list)
    validation: list[ValidationPoint] = field(default_factory=list)
    watched_best: float | None = None
    """Best value of the early-stopping metric."""
    without_improvement: int = 0
    """Evaluations since the best value."""
    stopped_early: bool = False
    suspects: Suspects = field(default_factory=Suspects)
    """Of the samples that were visited."""
    local: Tensor | None = None
    """This rank's sums since the last ``gather``, on the device; not saved."""
    visits: list[FirstVisits] = field(default_factory=list)
    """First visits of the steps since the last ``gather``; not saved."""
    unchecked: dict[int, int] = field(default_factory=dict)
    """Tokens by step, of the steps whose guard result was not read yet. Not saved: the results are
    read before each checkpoint."""

    def advance(self, sums: Tensor, tokens: int, visits: FirstVisits | None = None) -> None:
        """Record a step with this rank's sums, and its first visits if there are any."""
        self.unchecked[self.step] = tokens
        self.step += 1
        self.tokens += tokens
        self.local = sums if self.local is None else self.local + sums
        if visits is not None:
            self.visits.append(visits)

    def gather(self, total: Callable[[Tensor], Tensor]) -> None:
        """Add the sums of all ranks to ``pending`` and ``suspects``, on every rank. Synchronizes
        the device."""
        if self.local is None:  # true on all ranks alike: they do the same steps
            return
        parts = [self.local, *(visits.sums.flatten() for visits in self.visits)]
        found = torch.split(total(torch.cat(parts).cpu()), [len(part) for part in parts])
        sums = found[0].tolist()
        before = self.pending or [0.0] * len(sums)
        self.pending = [a + b for a, b in zip(before, sums, strict=True)]
        for visits, own in zip(self.visits, found[1:], strict=True):
            self.suspects.add(visits, own.view(3, -1).numpy())
        self.local, self.visits = None, []

    def take_figures(self, total: Callable[[Tensor], Tensor]) -> Figures | None:
        """Return the means since the last log point and reset them; None: no step was taken."""
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
        """Record the skipped steps among those done since the last call; their tokens do not count
        as trained. Return the longest sequence of consecutive skipped steps."""
        self.skipped_steps += len(found)
        self.tokens -= sum(self.unchecked.get(skipped.step, 0) for skipped in found)
        self.unchecked = {}
        streaks: list[list[Skipped]] = [[]]
        for skipped in (*self.skipped, *found):
            if streaks[-1] and skipped.step != streaks[-1][-1].step + 1:
                streaks.append([])
            streaks[-1].append(skipped)
        last = streaks[-1]
        self.skipped = last if last and last[-1].step == self.step - 1 else []
        return max(streaks, key=len)

    def metric_at(self, step: int, metric: Metric) -> float | None:
        """Return a validation metric at a step; None: not measured at that step."""
        if not self.validation or self.validation[-1].step != step:
            return None
        return self.validation[-1].overall.get(metric)

    def to_json(self) -> str:
        raw: dict[str, Any] = {k: v for k, v in self.__dict__.items() if k not in _UNSAVED}
        raw["curve"] = [p.to_json() for p in self.curve]
        raw["validation"] = [p.to_json() for p in self.validation]
        raw["suspects"] = self.suspects.to_json()
        return json.dumps(raw)

    @classmethod
    def from_json(cls, text: str) -> LoopState:
        raw = json.loads(text)
        raw["skipped"] = [Skipped(*skipped) for skipped in raw["skipped"]]
        raw["curve"] = [CurvePoint.model_validate(p) for p in raw["curve"]]
        raw["validation"] = [ValidationPoint.model_validate(p) for p in raw["validation"]]
        if "suspects" in raw:  # earlier releases have none
            raw["suspects"] = Suspects.from_json(raw["suspects"])
        return cls(**raw)
