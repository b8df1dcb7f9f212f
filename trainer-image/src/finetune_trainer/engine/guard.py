"""The guard: decides on the device, identically on all ranks, whether a step changes the weights.

    loss and gradient norm of a step, over all ranks ──► judge ──► taken, or skipped

The host does not wait for the decision: it masks the update on the device, and is read at the next
log point. The training loop decides what to do about too many skipped steps.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import torch
from torch import Tensor

from finetune_api.training import Guard as Rule

WARM_UP: Final = 20
"""Steps before a loss can be a spike, because losses fall fast at first."""
MEAN_STEPS: Final = 8
"""Steps of the running mean; few, to follow a falling loss."""
VARIANCE_STEPS: Final = 50
"""Steps of the running variance around the mean."""
_LEAST: Final = math.log(1.5)
"""Least height of a spike in log loss: half above the mean, however small the variance."""


class Skipped(NamedTuple):
    """A step whose update was skipped."""

    step: int
    spike: bool
    """Whether loss and gradient were finite, so that the loss was a spike."""


class Guard:
    """Judges the steps of one attempt."""

    def __init__(self, rule: Rule, device: torch.device) -> None:
        self._deviations = float(rule.spike_deviations or 0)
        # Number of steps, mean and variance of the log losses that were no spikes. Logarithms,
        # because a loss may fall by orders of magnitude, and its noise with it.
        self._statistics = torch.zeros(3, dtype=torch.float64, device=device)
        # (step, whether the step is taken, whether loss and gradient are finite)
        self._decisions: list[tuple[int, Tensor, Tensor]] = []

    def judge(self, step: int, loss: Tensor, norm: Tensor, *, learns: bool = True) -> Tensor:
        """Return whether a step is taken, as a boolean on the device; does not wait for the device.

        Args:
            loss: mean loss of the global batch, the same on all ranks.
            norm: norm of its gradient before clipping, the same on all ranks.
            learns: whether the batch has samples; if not, its loss of zero enters no statistics.
        """
        taken = finite = torch.isfinite(loss) & torch.isfinite(norm)
        if self._deviations and learns:
            taken = finite & ~self._spikes(loss.clamp(min=1e-12).log(), finite)
        self._decisions.append((step, taken, finite))
        return taken

    def _spikes(self, height: Tensor, finite: Tensor) -> Tensor:
        """Return whether a log loss is a spike; if not, and if finite, add it to the statistics."""
        steps, mean, variance = self._statistics.unbind()
        above = height - mean
        spike = (steps >= WARM_UP) & (
            above > (self._deviations * variance.sqrt()).clamp(min=_LEAST)
        )
        # Means over all steps at first, exponential means later.
        near, far = (torch.clamp(1 / (steps + 1), min=1 / n) for n in (MEAN_STEPS, VARIANCE_STEPS))
        after = (steps + 1, mean + near * above, variance + far * (above**2 - variance))
        self._statistics = torch.where(finite & ~spike, torch.stack(after), self._statistics)
        return spike

    def skipped(self) -> list[Skipped]:
        """Return the steps skipped since the last call; waits for the device."""
        asked, self._decisions = self._decisions, []
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
        """State for a checkpoint; waits for the device."""
        values: list[float] = self._statistics.tolist()
        return values

    def resume(self, statistics: list[float]) -> None:
        """Restore saved statistics, and drop decisions that were not read."""
        self._statistics = self._statistics.new_tensor(statistics or [0.0, 0.0, 0.0])
        self._decisions = []
