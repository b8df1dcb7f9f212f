"""Cross entropy of supervised tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy


def token_losses(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Negative log likelihood of each label in nats, float32, shape [supervised].

    Without smoothing it can be differentiated once.

    Args:
        logits: shape [supervised, vocabulary].
        labels: token ids, shape [supervised].
        smoothing: share of the target's probability that is spread over the vocabulary.
    """
    if smoothing:
        return cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)
    losses: Tensor = _InPlaceCrossEntropy.apply(logits.float(), labels)
    return losses


class _InPlaceCrossEntropy(torch.autograd.Function):
    """Cross entropy that computes the gradient in the memory of the log probabilities. PyTorch's
    backward pass fills a tensor of the logits' size with zeros, and reads it twice."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        """[supervised, vocabulary], [supervised] → [supervised]."""
        log_probabilities = logits.log_softmax(-1)
        ctx.save_for_backward(log_probabilities, labels)
        return -log_probabilities.gather(-1, labels[:, None]).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # In place: a second backward pass (retain_graph) raises RuntimeError in saved_tensors,
        # because the version of the saved tensor has changed.
        log_probabilities, labels = ctx.saved_tensors
        grad = grads[0][:, None]
        found = log_probabilities.exp_().mul_(grad)
        return found.scatter_add_(-1, labels[:, None], -grad), None
