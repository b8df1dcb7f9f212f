"""The loss: cross-entropy summed over supervised tokens, projected to the vocabulary only there.

Logits are the biggest tensor of all; a prompt's logits are never needed.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from finetune_trainer.engine.feed import RowTensors
from finetune_trainer.engine.packed import row_context


class TokenLoss(nn.Module):
    """A causal language model as a module from a row to its losses (what DDP wraps).

    ``forward`` returns the negative log likelihood of each supervised token in nats, float32,
    shape [supervised]; of a row without any, one zero that depends on the weights, so that
    every rank takes part in the collectives of the backward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        self._selects = "logits_to_keep" in inspect.signature(inner.forward).parameters

    def forward(self, row: RowTensors) -> Tensor:
        empty = row.labels.numel() == 0
        predict = row.predict if not empty else row.predict.new_zeros(1)
        extra: dict[str, Any] = {"logits_to_keep": predict} if self._selects else {}
        output = self.model(
            input_ids=row.input_ids, position_ids=row.position_ids, use_cache=False, **extra
        )
        logits = output.logits[0] if self._selects else output.logits[0].index_select(0, predict)
        if empty:
            nothing: Tensor = logits.float().sum()[None] * 0.0
            return nothing
        losses: Tensor = cross_entropy(logits.float(), row.labels, reduction="none")
        return losses


def row_losses(module: nn.Module, row: RowTensors) -> Tensor:
    """Losses of a row's supervised tokens, without gradient, shape [supervised]."""
    with torch.no_grad(), row_context(row.layout):
        losses: Tensor = module(row)
    return losses[: row.labels.numel()]
