"""Anchors against forgetting: what holds the tuned model near the untuned one.

outputs   KL(untuned || tuned) on replay documents, added to the loss (Li and Hoiem 2016,
          arXiv:1606.09282; Raghavan et al. 2024, arXiv:2205.00334)
weights   w <- w - rate * coefficient * (w - untuned), beside the optimizer as weight decay is
          (L2-SP; Li et al. 2018, arXiv:1802.01483)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine.dtensors import local_tensor
from finetune_trainer.engine.loss import BaseLogits, EvaluationMode, MicroBatchLosses, TokenLoss
from finetune_trainer.engine.optimizers import Optimizers
from finetune_trainer.engine.packing.feed import MicroBatch, TokenMicroBatch
from finetune_trainer.engine.packing.layout import layout_context


class OutputAnchor:
    """The untuned model: of an adapter the same weights without it, else a frozen copy."""

    def __init__(self, loss: TokenLoss, copy: TokenLoss | None = None) -> None:
        """
        Args:
            loss: the model under tuning, as it lies on the gang.
            copy: the untuned one, lying alike; None: ``loss`` has an adapter.
        """
        self._loss = loss
        self._copy = copy
        self._evaluation = EvaluationMode(loss)

    def outputs(self, micro_batch: MicroBatch) -> BaseLogits | None:
        """What the untuned model says of a row's replay documents; None where no rank has any. In
        shards every rank must ask for the same rows."""
        if not isinstance(micro_batch, TokenMicroBatch) or micro_batch.replay is None:
            return None
        documents = micro_batch.replay.micro_batch
        with torch.no_grad(), layout_context(documents.layout):
            if self._copy is not None:
                found: MicroBatchLosses = self._copy(documents, with_logits=True)
            else:
                with self._evaluation.on(), self._loss.base_model():
                    found = self._loss(documents, with_logits=True)
        assert found.logits is not None, "they were asked for"
        return BaseLogits(found.logits, micro_batch.replay.at)


class WeightAnchor:
    """The trained weights as they are when it is made, in shards as they are."""

    def __init__(self, optimizers: Optimizers, coefficient: float) -> None:
        self._coefficient = coefficient
        self._weights: list[tuple[float, nn.Parameter, Tensor]] = [
            (group["rate_factor"], weight, local_tensor(weight.detach()).clone())
            for optimizer in optimizers
            for group in optimizer.param_groups
            for weight in group["params"]
        ]

    @torch.no_grad()
    def pull(self, rate: float, taken: Tensor) -> None:
        """Draw the weights back where ``taken`` is true; nothing is waited for.

        Args:
            rate: learning rate of the step.
            taken: boolean on the device.
        """
        for factor, weight, base in self._weights:
            share = taken.to(base.dtype) * (rate * factor * self._coefficient)
            local_tensor(weight).lerp_(base, share)


def wants_copy(spec: FineTuneJobSpec) -> bool:
    """Whether an anchor needs a second, frozen model."""
    return float(spec.training.anchor.kl_coefficient) > 0 and not spec.method.kind.adapts


def anchor_bytes(model: nn.Module, spec: FineTuneJobSpec, halved: bool) -> int:
    """Bytes that anchors keep beside a model under tuning; ``halved``: in bfloat16."""
    numbers = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    pulls = float(spec.training.anchor.l2_coefficient) > 0
    return pulls * 4 * trained + wants_copy(spec) * (2 if halved else 4) * numbers
