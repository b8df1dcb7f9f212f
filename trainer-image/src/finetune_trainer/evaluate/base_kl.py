"""KL(base || tuned) on validation samples: an early warning of forgetting (Shenfeld et al. 2025,
arXiv:2509.04259, find that it predicts how much is forgotten).

    base, before the first step ──► BaseProbabilities of the likeliest tokens ──► storage
    tuned, at each validation   ──► probabilities of the same tokens ──► KL, nats per token

Of each predicted token, the base model's likeliest ones are told apart and all others count as one
outcome. So the figure is a lower bound of the divergence (data processing inequality), close to it
as the likeliest tokens have nearly all of the probability. It costs one pass over a few samples,
and needs no second model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load, save
from torch import Tensor

from finetune_trainer.engine.loss import evaluating
from finetune_trainer.evaluate.measure import Evaluator

LIKELIEST: Final = 64
"""Tokens told apart in each prediction."""
MOST_SAMPLES: Final = 64
MOST_LABELS: Final = 8192
"""Labels of all samples together: bounds what is kept (4 MiB)."""
_LABELS_AT_ONCE: Final = 1024
"""Labels of a sample and of a micro-batch: bounds the logits in memory."""


class BaseProbabilities(NamedTuple):
    """What the base model predicts for the labels of one sample."""

    tokens: npt.NDArray[np.int32]
    """Likeliest tokens, shape [labels, likeliest]."""
    logs: npt.NDArray[np.float32]
    """Logarithms of their probabilities, shape [labels, likeliest]."""


BasePredictions = Mapping[int, BaseProbabilities]
"""By position in the validation split."""


def samples_of(supervised: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """Return the positions of the validation samples that are measured: the first that are short
    enough.

    Args:
        supervised: labels of each validation sample, shape [samples].
    """
    short = np.flatnonzero((supervised > 0) & (supervised <= _LABELS_AT_ONCE))[:MOST_SAMPLES]
    return short[np.cumsum(supervised[short]) <= MOST_LABELS]


def base_probabilities(evaluator: Evaluator) -> BasePredictions:
    """Return what the model predicts for the first validation samples, identical on all ranks. It
    must still be the base model."""
    mine = {}
    for positions, logits in _predictions(evaluator):
        found = logits.log_softmax(-1).topk(min(LIKELIEST, logits.shape[-1]))
        tokens = found.indices.int().cpu().numpy()
        logs = found.values.cpu().numpy()
        for position in np.unique(positions):
            of_sample = positions == position
            mine[int(position)] = BaseProbabilities(tokens[of_sample], logs[of_sample])
    return dict(pair for part in evaluator.world.on_all(lambda: mine) for pair in part.items())


def base_kl(evaluator: Evaluator, kept: BasePredictions) -> float | None:
    """Return KL(base || tuned) in nats per label, identical on all ranks; None: nothing is kept."""
    sums = torch.zeros(2, dtype=torch.float64)
    if not kept:
        return None
    for positions, logits in _predictions(evaluator):
        if len(positions) == 0:
            continue
        samples = [kept[int(p)] for p in positions[np.r_[True, np.diff(positions) != 0]]]
        tokens = torch.from_numpy(np.concatenate([s.tokens for s in samples])).to(logits.device)
        base = torch.from_numpy(np.concatenate([s.logs for s in samples])).to(logits.device)
        tuned = logits.log_softmax(-1).gather(-1, tokens.long())
        sums[0] += divergence_of(base, tuned).double().sum().cpu()
        sums[1] += len(positions)
    total, labels = evaluator.world.sum(sums).tolist()
    return total / labels if labels else None


def divergence_of(base: Tensor, tuned: Tensor) -> Tensor:
    """KL(base || tuned) over some tokens and "any other", nats, shape [labels].

    Args:
        base, tuned: logarithms of probabilities, shape [labels, tokens].
    """
    told_apart = (base.exp() * (base - tuned)).sum(-1)
    least = torch.finfo(base.dtype).eps
    rest, rest_tuned = ((1 - logs.exp().sum(-1)).clamp_min(least) for logs in (base, tuned))
    return (told_apart + rest * (rest / rest_tuned).log()).clamp_min(0.0)


def to_bytes(kept: BasePredictions) -> bytes:
    """Return the file of the probabilities, in safetensors."""
    empty = BaseProbabilities(np.zeros((0, 0), np.int32), np.zeros((0, 0), np.float32))
    each = list(kept.values()) or [empty]
    return save(
        {
            "positions": np.array(list(kept), np.int64),
            "labels": np.array([len(of.tokens) for of in kept.values()], np.int64),
            "tokens": np.concatenate([of.tokens for of in each]),
            "logs": np.concatenate([of.logs for of in each]),
        }
    )


def from_bytes(text: bytes) -> BasePredictions:
    """Read the file of ``to_bytes``."""
    file = load(text)
    ends = np.cumsum(file["labels"])[:-1]
    parts = (np.split(file[name], ends) for name in ("tokens", "logs"))
    each = (BaseProbabilities(*pair) for pair in zip(*parts, strict=True))
    return dict(zip(file["positions"].tolist(), each, strict=False))


def _predictions(evaluator: Evaluator) -> Iterator[tuple[npt.NDArray[np.int64], Tensor]]:
    """Yield, of each of this rank's micro-batches, the sample of each label (its position in the
    validation split, shape [labels]) and the logits in float32, shape [labels, vocabulary]."""
    index = evaluator.data.index("validation")
    chosen = samples_of(index.supervised)
    with evaluating(evaluator.loss):
        for micro_batch, logits in evaluator.logits("validation", chosen, _LABELS_AT_ONCE):
            yield chosen[micro_batch.numbers.cpu().numpy()], logits.float()
