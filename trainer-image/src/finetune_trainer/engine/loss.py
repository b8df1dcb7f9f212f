"""The loss: cross-entropy summed over supervised tokens, projected to the vocabulary only there.

Logits are the biggest tensor of all; a prompt's logits are never needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, PeftType
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from finetune_trainer.engine.feed import RowTensors
from finetune_trainer.engine.layout import row_context
from finetune_trainer.failures import UserError


class TokenLoss(nn.Module):
    """A causal language model as a module from a row to its losses (what DDP wraps).

    ``forward`` returns the negative log likelihood of each supervised token in nats, float32,
    shape [supervised]; while training, each with the row's router loss (the balance of a mixture
    of experts) times ``router_coefficient`` added. Of a row without any, it is one zero that
    depends on the weights, so that every rank takes part in the collectives of the backward pass.
    """

    def __init__(
        self, model: nn.Module, router_coefficient: float = 0.0, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        self.model: Any = model
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        accepted = inspect.signature(inner.forward).parameters
        self._selects = "logits_to_keep" in accepted
        self._router_coefficient = router_coefficient
        self._label_smoothing = label_smoothing
        if router_coefficient and "output_router_logits" not in accepted:
            raise UserError(
                "NoRouter",
                f"spec.training.routerAuxLossCoefficient: {router_coefficient:g}, but a"
                f" {type(inner).__name__} gives no account of a router; remove the field",
            )
        config = model.active_peft_config if isinstance(model, PeftModel) else None
        # Virtual tokens stand before a document that has its row to itself: positions are those of
        # the row, and peft counts them. Those of prompt tuning have logits too, which come first.
        self._virtual = config is not None and config.is_prompt_learning
        self._shift = (
            config.num_virtual_tokens
            if config and config.peft_type == PeftType.PROMPT_TUNING
            else 0
        )

    @contextmanager
    def untuned(self) -> Iterator[None]:
        """The model as it was, of methods whose new weights change it before the first step."""
        if not self._virtual:
            yield
            return
        kept = self._virtual, self._shift
        self._virtual, self._shift = False, 0
        try:
            with self.model.disable_adapter():
                yield
        finally:
            self._virtual, self._shift = kept

    def forward(self, row: RowTensors) -> Tensor:
        empty = row.labels.numel() == 0
        predict = (row.predict if not empty else row.predict.new_zeros(1)) + self._shift
        extra: dict[str, Any] = {"logits_to_keep": predict} if self._selects else {}
        if not self._virtual:
            extra["position_ids"] = row.position_ids
        balanced = self.training and self._router_coefficient > 0
        if balanced:
            extra["output_router_logits"] = True
        output = self.model(input_ids=row.input_ids, use_cache=False, **extra)
        logits = output.logits[0] if self._selects else output.logits[0].index_select(0, predict)
        if empty:
            nothing: Tensor = logits.float().sum()[None] * 0.0
            return nothing
        smoothing = self._label_smoothing if self.training else 0.0
        losses: Tensor = cross_entropy(
            logits.float(), row.labels, reduction="none", label_smoothing=smoothing
        )
        # With every token, so that the step's is the mean over its rows by their tokens.
        return losses + self._router_coefficient * output.aux_loss if balanced else losses


def row_losses(module: nn.Module, row: RowTensors) -> Tensor:
    """Losses of a row's supervised tokens, without gradient, shape [supervised]."""
    with torch.no_grad(), row_context(row.layout):
        losses: Tensor = module(row)
    return losses[: row.labels.numel()]
