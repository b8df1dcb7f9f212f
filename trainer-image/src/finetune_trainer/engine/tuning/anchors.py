"""Anchors against forgetting: keep the tuned model near the base model.

outputs   KL(base || tuned) on replay documents, added to the loss (Li and Hoiem 2016,
          arXiv:1606.09282; Raghavan et al. 2024, arXiv:2205.00334)
weights   w <- w - rate * coefficient * (w - base), decoupled from the optimizer like weight decay
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
    """Logits of the base model: the same model with its adapter disabled, else a frozen copy."""

    def __init__(self, loss: TokenLoss, copy: TokenLoss | None = None) -> None:
        """
        Args:
            loss: the model under tuning, already placed on the ranks.
            copy: the base model, placed identically; None: ``loss`` has an adapter.
        """
        self._loss = loss
        self._copy = copy
        self._evaluation = EvaluationMode(loss)

    def outputs(self, micro_batch: MicroBatch) -> BaseLogits | None:
        """Base logits of a micro-batch's replay documents; None if no rank has any. A sharded model
        makes this a collective: all ranks must call it for the same micro-batches."""
        if not isinstance(micro_batch, TokenMicroBatch) or micro_batch.replay is None:
            return None
        documents = micro_batch.replay.micro_batch
        with torch.no_grad(), layout_context(documents.layout):
            if self._copy is not None:
                found: MicroBatchLosses = self._copy(documents, with_logits=True)
            else:
                with self._evaluation.on(), self._loss.base_model():
                    found = self._loss(documents, with_logits=True)
        assert found.logits is not None, "logits were requested"
        return BaseLogits(found.logits, micro_batch.replay.at)


class WeightAnchor:
    """Snapshot of the trained weights at construction, sharded as the weights are."""

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
        """Pull the weights towards the snapshot if ``taken`` is true; needs no device
        synchronization.

        Args:
            rate: learning rate of the step.
            taken: whether the optimizer step was made; a boolean on the device.
        """
        for factor, weight, base in self._weights:
            share = taken.to(base.dtype) * (rate * factor * self._coefficient)
            local_tensor(weight).lerp_(base, share)


def wants_copy(spec: FineTuneJobSpec) -> bool:
    """Whether an anchor needs a second, frozen model."""
    return float(spec.training.anchor.kl_coefficient) > 0 and not spec.method.kind.adapts


def anchor_bytes(model: nn.Module, spec: FineTuneJobSpec, halved: bool) -> int:
    """Bytes that anchors keep besides the model under tuning; ``halved``: whether a frozen copy is
    in bfloat16."""
    numbers = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    pulls = float(spec.training.anchor.l2_coefficient) > 0
    return pulls * 4 * trained + wants_copy(spec) * (2 if halved else 4) * numbers
