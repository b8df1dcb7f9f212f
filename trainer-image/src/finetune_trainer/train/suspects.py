"""Suspect labels: training samples whose labels the model found unlikely when it first saw them.

    first visit of a sample ──► loss per label, by a model that was not trained on it
        ──► beside samples of its set with about as many labels, in the steps around ──► deviation
        ──► the most deviating ones, in every checkpoint ──► with their texts, in the result

A loss that is measured before the model learns from the sample is a held-out loss, and costs no
pass of its own (prequential evaluation; Dawid 1984). Wrong labels have high ones: networks learn
what samples have in common before they learn single labels by heart (Arpit et al. 2017,
arXiv:1706.05394). So later visits do not count. The visit of a skipped step does: the guard skips
the update, and the loss was measured before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from finetune_trainer.engine.planning.plan import Plan, Step
from finetune_trainer.personal import covered, uncovered
from finetune_trainer.prepared.dataset import AnsweredPrompt, PreparedData
from finetune_trainer.prepared.origins import located
from finetune_trainer.storage.runfiles import SuspectLabel, SuspectLabels

MOST: Final = 50
"""Samples that are kept: as many as a person reads."""
UNLIKELY: Final = 5.0
"""Deviation from which a sample stands out."""
_LISTED: Final = 2.0
"""Deviation from which a sample is kept."""
_CHARACTERS: Final = 200
"""Of a prompt or label in the result."""
_WINDOW: Final = 128
"""Samples, before those of the step, that a sample is compared with: the loss falls during the
first epoch."""
_FEWEST: Final = 16
"""Samples without which nothing is usual."""
_LEAST_SPREAD: Final = 0.25
"""Of the loss of one label, in nats; that of a mean over n labels is divided by the square root of
n. Where a model is almost always right, a label that it gives a chance of one half is usual."""
_QUARTILE: Final = 0.6745
"""Upper quartile of the standard normal distribution."""

Floats = npt.NDArray[np.float64]
Alike = tuple[int, int]
"""Source, and bits of the number of labels: means of few labels scatter more, and short answers
have higher losses per label."""


@dataclass(frozen=True)
class FirstVisits:
    """The samples of a step that the run sees for the first time."""

    positions: Sequence[int]
    """Index position of each."""
    sources: Sequence[int]
    """Source index of each."""
    numbers: Sequence[int]
    """Number of each in the step."""
    sums: Tensor
    """Loss and number of labels of each sample of the step, on this rank; shape [2, samples]."""


def first_visits(plan: Plan, step: Step, sums: Tensor) -> FirstVisits | None:
    """Return the first visits of a step; None: it has none.

    Args:
        sums: of ``optimizer_step``.
    """
    if not step.first_visits:
        return None
    positions = [step.samples[number] for number in step.first_visits]
    return FirstVisits(positions, plan.sources[positions].tolist(), step.first_visits, sums)


class Suspect(NamedTuple):
    """A sample with its first loss."""

    position: int
    """Index position."""
    loss: float
    """Nats per label."""
    usual: float
    """Median of the samples that it was compared with."""
    deviation: float
    """Excess of the loss over ``usual``, in standard deviations."""


@dataclass
class Suspects:
    """First losses up to a step: the same on all ranks, and for any number of ranks."""

    measured: int = 0
    """Samples that were compared with others."""
    unlikely: int = 0
    """Samples whose deviation is at least ``UNLIKELY``."""
    worst: list[Suspect] = field(default_factory=list)
    """The most deviating samples, the worst first; at most ``MOST``."""
    recent: dict[Alike, Floats] = field(default_factory=dict)
    """Losses per label of the last ``_WINDOW`` samples that are alike."""

    def add(self, visits: FirstVisits, sums: Floats) -> None:
        """Add the first visits of a step. Steps are added one by one, in order.

        Args:
            sums: as ``visits.sums``, of all ranks.
        """
        totals, labels = sums[:, list(visits.numbers)]
        kinds: dict[Alike, list[int]] = {}
        for i in np.flatnonzero(np.isfinite(totals) & (labels > 0)).tolist():
            kinds.setdefault((visits.sources[i], int(labels[i]).bit_length()), []).append(i)
        for alike, rows in kinds.items():
            losses = totals[rows] / labels[rows]
            window = np.concatenate([self.recent.get(alike, np.empty(0)), losses])
            self.recent[alike] = window[-_WINDOW:]
            if len(window) < _FEWEST:
                continue
            usual, spread = usual_losses(window)
            deviations = (losses - usual) / np.maximum(
                spread, _LEAST_SPREAD / np.sqrt(labels[rows])
            )
            self.measured += len(rows)
            self.unlikely += int((deviations >= UNLIKELY).sum())
            least = self.worst[-1].deviation if len(self.worst) == MOST else _LISTED
            for i in np.flatnonzero(deviations >= least).tolist():
                position = visits.positions[rows[i]]
                self.worst.append(Suspect(position, float(losses[i]), usual, float(deviations[i])))
        self.worst = sorted(self.worst, key=lambda s: (-s.deviation, s.position))[:MOST]

    def to_json(self) -> dict[str, Any]:
        recent = [(*alike, losses.tolist()) for alike, losses in self.recent.items()]
        return {**self.__dict__, "recent": recent}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Suspects:
        worst = [Suspect(*each) for each in raw["worst"]]
        recent = {(source, size): np.array(losses) for source, size, losses in raw["recent"]}
        return cls(**{**raw, "worst": worst, "recent": recent})


def usual_losses(losses: Floats) -> tuple[float, float]:
    """Return median and spread of losses, in nats. The spread is the standard deviation of a normal
    distribution with the same upper quartile: losses are skewed, and some of the labels, but fewer
    than a quarter, may be wrong."""
    ordered = np.sort(losses)
    median, quartile = ordered[len(ordered) // 2], ordered[3 * len(ordered) // 4]
    return float(median), float(quartile - median) / _QUARTILE


def suspect_labels(
    found: Suspects, data: PreparedData, tokenizer: PreTrainedTokenizerBase
) -> SuspectLabels:
    """Return the suspects with object, line and texts. Reads their shards."""
    positions = [suspect.position for suspect in found.worst]
    origins = located(data, positions)
    answered = data.answered_prompts("train", positions)
    samples = []
    for suspect, origin, sample in zip(found.worst, origins, answered, strict=True):
        prompt, label = _texts(sample, tokenizer)
        samples.append(
            SuspectLabel(
                **dict(origin),
                prompt=prompt,
                label=label,
                loss=suspect.loss,
                usual_loss=suspect.usual,
                deviation=suspect.deviation,
            )
        )
    return SuspectLabels(
        measured=found.measured, unlikely=found.unlikely, threshold=UNLIKELY, samples=samples
    )


def _texts(sample: AnsweredPrompt, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return the end of a sample's prompt and the beginning of its label. Personal data is masked
    even where the samples keep it, as in previews: more people read reports than data."""

    def text(ids: npt.NDArray[np.int32]) -> str:
        return covered(str(tokenizer.decode(ids, skip_special_tokens=True)))

    if sample.label is not None:
        prompt, label = text(sample.ids[: sample.prompt_length or None]), covered(sample.label)
    else:
        prompt = text(sample.ids[: sample.prompt_length])
        label = text(sample.ids[sample.prompt_length :])
    cut, more = len(prompt) > _CHARACTERS, len(label) > _CHARACTERS
    return (
        "… " * cut + uncovered(prompt[-_CHARACTERS:]),
        uncovered(label[:_CHARACTERS]) + " …" * more,
    )
