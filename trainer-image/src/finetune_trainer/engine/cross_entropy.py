"""Cross entropy of supervised tokens."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from finetune_api.training import TokenWeighting

LIKELIEST: Final = 20
"""Tokens whose entropy stands for that of the vocabulary (Diao et al. 2026)."""


def token_losses(
    logits: Tensor, labels: Tensor, smoothing: float = 0.0, weighting: TokenWeighting = "None"
) -> Tensor:
    """Negative log likelihood of each label in nats, float32, shape [supervised]. It can be
    differentiated once.

    Smoothing and weights change the gradient alone, so that losses are comparable.

    Args:
        logits: shape [supervised, vocabulary].
        labels: token ids, shape [supervised].
        smoothing: share of the target's probability that is spread over the vocabulary.
        weighting: see ``token_weights``. Without smoothing.
    """
    losses: Tensor = _InPlaceCrossEntropy.apply(logits.float(), labels, smoothing)
    if weighting == "None":
        return losses
    weighted: Tensor = _WeightedGradient.apply(losses, token_weights(logits, losses, weighting))
    return weighted


def token_weights(logits: Tensor, losses: Tensor, weighting: TokenWeighting) -> Tensor:
    """Weight of each token from 0 to 1, without gradient, float32, shape [supervised].

    - Probability: that of the label (DFT, arXiv:2508.05629).
    - Entropy: that of the LIKELIEST tokens among themselves, by its maximum (EAFT,
      arXiv:2601.02151).

    Args:
        logits: shape [supervised, vocabulary].
        losses: negative log likelihood of each label, shape [supervised].
    """
    if weighting == "Probability":
        return losses.detach().neg().exp()
    count = min(LIKELIEST, logits.shape[-1])
    likeliest = logits.detach().topk(count, sorted=False).values.float().log_softmax(-1)
    return -(likeliest.exp() * likeliest).sum(-1) / math.log(count)


class _WeightedGradient(torch.autograd.Function):
    """Losses as they are, with a weight on the gradient of each."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(weights)
        return losses.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        return grads[0] * weights, None


class _InPlaceCrossEntropy(torch.autograd.Function):
    """Cross entropy that computes the gradient in the memory of the log probabilities. PyTorch's
    backward pass fills a tensor of the logits' size with zeros, and reads it twice.

    With smoothing s and V tokens, the gradient is softmax - (1 - s) one-hot - s / V."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        """[supervised, vocabulary], [supervised] → [supervised]."""
        log_probabilities = logits.log_softmax(-1)
        ctx.save_for_backward(log_probabilities, labels)
        ctx.smoothing = smoothing
        return -log_probabilities.gather(-1, labels[:, None]).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        # In place: a second backward pass (retain_graph) raises RuntimeError in saved_tensors,
        # because the version of the saved tensor has changed.
        log_probabilities, labels = ctx.saved_tensors
        grad = grads[0][:, None]
        found = log_probabilities.exp_()
        if ctx.smoothing:
            found.sub_(ctx.smoothing / found.shape[-1])
        found.mul_(grad).scatter_add_(-1, labels[:, None], (ctx.smoothing - 1) * grad)
        return found, None, None
