"""The loss of supervised tokens beside PyTorch's."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from finetune_api.training import TokenWeighting
from finetune_trainer.engine.cross_entropy import token_losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_values_and_gradients_are_those_of_pytorch(dtype: torch.dtype, smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(37, 101, generator=generator)).to(dtype)
    labels = torch.randint(101, (37,), generator=generator)
    weights = torch.randn(37, generator=generator)
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    found = token_losses(ours, labels, smoothing)
    plain = cross_entropy(theirs.float(), labels, reduction="none")
    expected = cross_entropy(theirs.float(), labels, reduction="none", label_smoothing=smoothing)
    assert found.dtype == torch.float32 and found.shape == (37,)
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-6)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert ours.grad is not None and ours.grad.dtype == dtype
    torch.testing.assert_close(ours.grad, theirs.grad)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    chances = logits.softmax(-1)
    return -(chances * chances.log()).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighting", ["Entropy", "Probability"])
@pytest.mark.parametrize("vocabulary", [7, 101])
def test_weights_are_of_the_gradient_alone(
    dtype: torch.dtype, weighting: TokenWeighting, vocabulary: int
) -> None:
    """EAFT: entropy of the 20 likeliest tokens over log 20; DFT: the label's probability. Both
    without a gradient of their own."""
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(37, vocabulary, generator=generator)).to(dtype)
    labels = torch.randint(vocabulary, (37,), generator=generator)
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    found = token_losses(ours, labels, weighting=weighting)
    expected = cross_entropy(theirs.float(), labels, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    count = min(20, vocabulary)
    weights = (
        (-expected).exp()
        if weighting == "Probability"
        else entropy(logits.float().sort(descending=True).values[:, :count]) / math.log(count)
    ).detach()
    assert 0 <= weights.min() < weights.max() <= 1
    found.mean().backward()
    (expected * weights).mean().backward()
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_second_backward_pass_is_refused() -> None:
    logits = torch.randn(3, 5).requires_grad_()
    losses = token_losses(logits, torch.tensor([0, 4, 2]))
    losses.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()
