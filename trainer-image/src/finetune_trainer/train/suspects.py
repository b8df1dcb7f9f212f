"""Suspect labels: training samples whose labels the model found unlikely when it first saw them.

    first visit of a sample ──► loss per label, by a model that was not trained on it
        ──► beside samples of its set with about as many labels, or an equal answer, in the steps
            around ──► deviation
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
_EQUAL: Final = 16
"""Samples with an equal answer that are remembered, of the last ``_ANSWERS`` answers."""
_ANSWERS: Final = 64
_FEWEST_EQUAL: Final = 4
"""Samples with an equal answer that show what is usual for it."""
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
    """Sums of each sample of the step on this rank: loss, number of labels, label ids; shape
    [3, samples]."""


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
    """Median of the samples that it was compared with, or of those with an equal answer if that is
    higher."""
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
    answers: dict[Alike, dict[int, list[float]]] = field(default_factory=dict)
    """The same of the last ``_EQUAL`` samples with an equal answer, by the sum of its label ids."""

    def add(self, visits: FirstVisits, sums: Floats) -> None:
        """Add the first visits of a step. Steps are added one by one, in order.

        Args:
            sums: as ``visits.sums``, of all ranks.
        """
        totals, labels, answers = sums[:, list(visits.numbers)]
        kinds: dict[Alike, list[int]] = {}
        for i in np.flatnonzero(np.isfinite(totals) & (labels > 0)).tolist():
            kinds.setdefault((visits.sources[i], int(labels[i]).bit_length()), []).append(i)
        for alike, rows in kinds.items():
            losses = totals[rows] / labels[rows]
            window = np.concatenate([self.recent.get(alike, np.empty(0)), losses])
            self.recent[alike] = window[-_WINDOW:]
            own = self._usual_of_answers(alike, answers[rows], losses)
            if len(window) < _FEWEST:
                continue
            least = _LEAST_SPREAD / np.sqrt(labels[rows])
            usual, spread = np.maximum(own, usual_losses(window)).T
            deviations = (losses - usual) / np.maximum(spread, least)
            self.measured += len(rows)
            self.unlikely += int((deviations >= UNLIKELY).sum())
            lowest = self.worst[-1].deviation if len(self.worst) == MOST else _LISTED
            for i in np.flatnonzero(deviations >= lowest).tolist():
                position = visits.positions[rows[i]]
                self.worst.append(
                    Suspect(position, float(losses[i]), float(usual[i]), float(deviations[i]))
                )
        self.worst = sorted(self.worst, key=lambda s: (-s.deviation, s.position))[:MOST]

    def _usual_of_answers(self, alike: Alike, answers: Floats, losses: Floats) -> Floats:
        """Remember samples, and return ``usual_losses`` of those with each one's answer; 0: they
        are too few. A rare class is unlikely before it is learned, but no wrong label."""
        known = self.answers.setdefault(alike, {})
        keys = [int(answer) for answer in answers]
        for key, loss in zip(keys, losses.tolist(), strict=True):
            known[key] = [*known.pop(key, []), loss][-_EQUAL:]
        usual = {k: usual_losses(known[k]) for k in keys if len(known[k]) >= _FEWEST_EQUAL}
        for key in list(known)[:-_ANSWERS]:
            del known[key]
        return np.array([usual.get(key, (0.0, 0.0)) for key in keys])

    def to_json(self) -> dict[str, Any]:
        recent = [(*alike, losses.tolist()) for alike, losses in self.recent.items()]
        answers = [(*alike, list(known.items())) for alike, known in self.answers.items()]
        return {**self.__dict__, "recent": recent, "answers": answers}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Suspects:
        worst = [Suspect(*each) for each in raw["worst"]]
        recent = {(source, size): np.array(losses) for source, size, losses in raw["recent"]}
        answers = {(source, size): dict(known) for source, size, known in raw["answers"]}
        return cls(**{**raw, "worst": worst, "recent": recent, "answers": answers})


def usual_losses(losses: Sequence[float] | Floats) -> tuple[float, float]:
    """Return median and spread of losses, in nats. The spread is the standard deviation of a normal
    distribution with the same upper quartile: losses are skewed, and some of the labels, but fewer
    than a quarter, may be wrong."""
    ordered = np.sort(losses)
    middle, quartile = ordered[len(ordered) // 2], ordered[3 * len(ordered) // 4]
    return float(middle), float(quartile - middle) / _QUARTILE


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
