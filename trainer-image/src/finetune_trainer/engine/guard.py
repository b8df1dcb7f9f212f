"""The guard: whether a step may change the weights, decided on the device and alike on all ranks.

    loss and gradient norm of a step, over the gang ──► judge ──► taken, or skipped

Nothing waits for the verdict: it masks the step where it is made, and is read at the next log
point. What follows from too many skipped steps is the loop's to decide.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import torch
from torch import Tensor

from finetune_api.training import Guard as Rule

WARM_UP: Final = 20
"""Steps before a loss can be a spike: the losses of the first steps fall fast."""
MEAN_STEPS: Final = 8
"""Steps of the running mean: few, so that it keeps up with a falling loss."""
VARIANCE_STEPS: Final = 50
"""Steps of the running variance around it."""
_LEAST: Final = math.log(1.5)
"""A spike exceeds the mean by half, however steady the losses were."""


class Skipped(NamedTuple):
    """A step whose update was not made."""

    step: int
    spike: bool
    """Whether loss and gradient were finite numbers: the loss was a spike, then."""


class Guard:
    """Judges the steps of one attempt."""

    def __init__(self, rule: Rule, device: torch.device) -> None:
        self._deviations = float(rule.spike_deviations or 0)
        # Steps, mean and variance of the logarithm of the losses that were no spikes: a loss may
        # fall by orders of magnitude, and its noise with it.
        self._statistics = torch.zeros(3, dtype=torch.float64, device=device)
        # Of each step, whether it is taken, and whether loss and gradient are finite.
        self._verdicts: list[tuple[int, Tensor, Tensor]] = []

    def judge(self, step: int, loss: Tensor, norm: Tensor, *, learns: bool = True) -> Tensor:
        """Whether a step is taken: a boolean on the device that nobody has waited for.

        Args:
            loss: of the global batch, the same on all ranks.
            norm: of its gradient before clipping, the same on all ranks.
            learns: whether the batch has samples; without, its loss of zero is in no statistics.
        """
        taken = finite = torch.isfinite(loss) & torch.isfinite(norm)
        if self._deviations and learns:
            taken = finite & ~self._spikes(loss.clamp(min=1e-12).log(), finite)
        self._verdicts.append((step, taken, finite))
        return taken

    def _spikes(self, height: Tensor, finite: Tensor) -> Tensor:
        """Whether the logarithm of a loss is a spike; if it is none, it joins the statistics."""
        steps, mean, variance = self._statistics.unbind()
        above = height - mean
        spike = (steps >= WARM_UP) & (
            above > (self._deviations * variance.sqrt()).clamp(min=_LEAST)
        )
        # Means of all steps at first, then exponential ones.
        near, far = (torch.clamp(1 / (steps + 1), min=1 / n) for n in (MEAN_STEPS, VARIANCE_STEPS))
        after = (steps + 1, mean + near * above, variance + far * (above**2 - variance))
        self._statistics = torch.where(finite & ~spike, torch.stack(after), self._statistics)
        return spike

    def skipped(self) -> list[Skipped]:
        """Steps that were skipped since this was asked last; waits for the device."""
        asked, self._verdicts = self._verdicts, []
        if not asked:
            return []
        found = torch.stack([torch.stack([taken, finite]) for _, taken, finite in asked]).tolist()
        return [
            Skipped(step, spike=finite)
            for (step, *_), (taken, finite) in zip(asked, found, strict=True)
            if not taken
        ]

    @property
    def statistics(self) -> list[float]:
        """What it must not forget; waits for the device."""
        values: list[float] = self._statistics.tolist()
        return values

    def resume(self, statistics: list[float]) -> None:
        """Go on as a guard with these statistics; verdicts that were not asked for are dropped."""
        self._statistics = self._statistics.new_tensor(statistics or [0.0, 0.0, 0.0])
        self._verdicts = []
