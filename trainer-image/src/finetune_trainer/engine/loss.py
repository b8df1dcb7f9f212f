"""The loss of a causal language model, at supervised tokens alone.

Logits are the largest tensor of a step. Those of prompts are never computed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft import PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import kl_div

from finetune_api.training import TokenWeighting
from finetune_trainer.engine.chunked_head import ChunkedHead
from finetune_trainer.engine.compilation import uncompiled
from finetune_trainer.engine.cross_entropy import token_losses
from finetune_trainer.engine.packing.feed import MicroBatch, TokenMicroBatch
from finetune_trainer.engine.packing.layout import layout_context
from finetune_trainer.engine.packing.packed import attends_documents, counts_positions
from finetune_trainer.engine.parameters import decoder_blocks
from finetune_trainer.failures import UserError


class MicroBatchLosses(NamedTuple):
    """The losses of a micro-batch. A NamedTuple, so that FSDP2's hooks find its tensors."""

    tokens: Tensor
    """Negative log likelihood of each supervised token in nats, float32, shape [supervised].
    Without supervised tokens: one zero that depends on the weights, so that every rank takes part
    in the collectives of the backward pass."""
    added: Tensor
    """Terms that training adds to the sum of ``tokens``: router loss and divergence, times their
    coefficients."""
    drift: Tensor
    """KL(base || tuned) at each anchored token, nats, without gradient; shape [anchored]."""
    router: Tensor
    """The router loss (load balance of a mixture of experts), without gradient."""
    logits: Tensor | None
    """Of the supervised tokens, shape [supervised, vocabulary]; None unless requested."""


@dataclass(frozen=True)
class BaseLogits:
    """Logits of the base model for some of a micro-batch's supervised tokens. A dataclass, so that
    FSDP2's hooks do not find (and round) its tensors."""

    logits: Tensor
    """Shape [anchored, vocabulary]."""
    at: Tensor
    """Their index among the supervised tokens, shape [anchored]."""


class TokenLoss(nn.Module):
    """A causal language model as a module from a micro-batch to its losses: the module that DDP and
    FSDP wrap."""

    def __init__(
        self,
        model: nn.Module,
        router_coefficient: float = 0.0,
        label_smoothing: float = 0.0,
        anchor_coefficient: float = 0.0,
        token_weighting: TokenWeighting = "None",
        plain_head: bool | None = None,
    ) -> None:
        """
        Args:
            plain_head: see ``ChunkedHead``.
        """
        super().__init__()
        self.model: Any = model
        inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        accepted = inspect.signature(inner.forward).parameters
        self._selects = "logits_to_keep" in accepted
        # Found once: an anchor disables and enables them in every micro-batch.
        self._adapted = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
        self._masks = _takes(accepted, "attention_mask")
        self._selected = SelectingHead(inner)
        self._chunks = ChunkedHead(inner, plain=plain_head) if self._selects else None
        self._router_coefficient = router_coefficient
        self._label_smoothing = label_smoothing
        self._token_weighting = token_weighting
        self._anchor_coefficient = anchor_coefficient
        if router_coefficient and "output_router_logits" not in accepted:
            raise UserError(
                "NoRouter",
                f"spec.training.routerAuxLossCoefficient: {router_coefficient:g}, but a"
                f" {type(inner).__name__} has no router loss; remove the field",
            )
        config = model.active_peft_config if isinstance(model, PeftModel) else None
        # Virtual tokens precede each padded document, and peft counts their positions. Those of
        # prompt tuning have logits too, before the document's.
        self._virtual = config is not None and config.is_prompt_learning
        self._counts = counts_positions(inner)
        self._attends_documents = attends_documents(inner)
        self._shift = (
            config.num_virtual_tokens
            if config and config.peft_type == PeftType.PROMPT_TUNING
            else 0
        )

    @contextmanager
    def base_model(self) -> Iterator[None]:
        """The model without its adapter, for a while. Trained weights of the model itself stay:
        they are the base's only before the first step."""
        kept = self._virtual, self._shift
        # peft's own switch changes requires_grad, and would unfreeze PiSSA's frozen adapter.
        self._virtual, self._shift = False, 0
        for layer in self._adapted:
            layer._disable_adapters = True
        try:
            with self.model.disable_adapter() if kept[0] else nullcontext():
                yield
        finally:
            self._virtual, self._shift = kept
            for layer in self._adapted:
                layer._disable_adapters = False

    def logits_at_once(self) -> int | None:
        """Tokens whose logits are in memory together during training; None: all of a
        micro-batch."""
        added = self._router_coefficient or self._anchor_coefficient
        if self._chunks is None or self._virtual or added:
            return None
        return self._chunks.chunk_tokens()

    @property
    def plain_head(self) -> bool:
        """Whether logits can be computed in chunks."""
        return self._chunks is not None and self._chunks.chunk_tokens() is not None

    def forward(
        self,
        micro_batch: TokenMicroBatch,
        base: BaseLogits | None = None,
        with_logits: bool = False,
    ) -> MicroBatchLosses:
        empty = micro_batch.labels.numel() == 0
        predict = micro_batch.predict if not empty else micro_batch.predict.new_zeros(1)
        extra: dict[str, Any] = {}
        if self._selects and not micro_batch.is_padded:
            extra["logits_to_keep"] = predict + self._shift
        if not self._virtual:
            extra |= self._positions(micro_batch)
        extra |= self._mask(micro_batch)
        balanced = self.training and self._router_coefficient > 0
        if balanced:
            extra["output_router_logits"] = True
        elif (
            base is None
            and not (self._virtual or with_logits)
            and self._chunks is not None
            and self._chunks.applies(len(micro_batch.labels))
        ):
            return self._in_chunks(micro_batch, self._chunks)
        if micro_batch.is_padded:
            with self._selected.only(predict, micro_batch.input_ids.shape[1]) as selected:
                output = self.model(input_ids=micro_batch.input_ids, use_cache=False, **extra)
            logits = selected(output.logits)
        else:
            output = self.model(input_ids=micro_batch.input_ids, use_cache=False, **extra)
            logits = output.logits.squeeze(0)  # the gradient of [0] fills zeros of their size
            if not self._selects:
                logits = logits.index_select(0, predict + self._shift)
        none = logits.new_zeros((), dtype=torch.float32)
        if empty:
            nothing = logits.float().sum()[None] * 0.0
            return MicroBatchLosses(nothing, none, none.new_zeros(0), none, logits[:0])
        tokens = token_losses(logits, micro_batch.labels, *self._objective)
        added, drift, router = none, none.new_zeros(0), none
        if balanced:
            router = output.aux_loss
            # Times the tokens: the step's router loss is then the mean over its tokens.
            added = added + self._router_coefficient * len(tokens) * router
        if base is not None:
            drift = divergence(base.logits, logits.index_select(0, base.at))
            added = added + self._anchor_coefficient * drift.sum()
        return MicroBatchLosses(
            tokens, added, drift.detach(), router.detach(), logits if with_logits else None
        )

    def _positions(self, micro_batch: TokenMicroBatch) -> dict[str, Tensor]:
        if self._counts:
            return {}
        known = {"position_ids": micro_batch.position_ids}
        if self._attends_documents:
            # Without a mask, transformers searches the positions for documents, which waits for the
            # device. The attention of packed documents ignores the mask.
            known["attention_mask"] = torch.ones_like(micro_batch.input_ids, dtype=torch.bool)
        return known

    def _mask(self, micro_batch: TokenMicroBatch) -> dict[str, Tensor]:
        """The mask of padding, for models that accept one. Others only look back."""
        if micro_batch.attention_mask is None or not self._masks:
            return {}
        return {"attention_mask": micro_batch.attention_mask}

    def _in_chunks(self, micro_batch: TokenMicroBatch, chunks: ChunkedHead) -> MicroBatchLosses:
        """The losses of a micro-batch whose logits exceed a chunk."""
        tokens = chunks.losses(
            {"input_ids": micro_batch.input_ids, **self._positions(micro_batch),
            **self._mask(micro_batch)}, micro_batch.predict, micro_batch.labels, *self._objective,
        )  # fmt: skip
        none = tokens.new_zeros(())
        return MicroBatchLosses(tokens, none, tokens.new_zeros(0), none, None)

    @property
    def _objective(self) -> tuple[float, TokenWeighting]:
        """Smoothing and weighting of ``token_losses``: both of training alone."""
        return (self._label_smoothing, self._token_weighting) if self.training else (0.0, "None")


class SelectingHead:
    """The output head of a language model at selected tokens of padded documents. (transformers'
    ``logits_to_keep`` selects the same positions in each document.)

    Args:
        model: the language model, without the adapter around it.
    """

    def __init__(self, model: Any) -> None:
        self._wanted: Tensor | None = None
        self._longest = 0
        self._done = False
        head = model.get_output_embeddings()
        if head is not None:
            head.register_forward_pre_hook(self._select)

    def _select(self, _head: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._wanted is None or given[0].ndim != 3:
            return None
        self._done = True
        return (self._of(given[0], self._wanted)[None], *given[1:])

    def _of(self, tokens: Tensor, wanted: Tensor) -> Tensor:
        """[documents, virtual and own tokens, width] → [wanted, width]."""
        each = tokens.shape[1]
        document, position = wanted // self._longest, wanted % self._longest
        # Virtual tokens come first.
        return tokens.flatten(0, 1).index_select(
            0, document * each + (each - self._longest) + position
        )

    @contextmanager
    def only(self, wanted: Tensor, longest: int) -> Iterator[Callable[[Tensor], Tensor]]:
        """Compute only the logits of selected tokens, for a while.

        Args:
            wanted: positions in the flattened documents, shape [wanted].
            longest: tokens of each document, padding included.

        Yields:
            A function from the model's logits to those of shape [wanted, vocabulary].
        """
        self._wanted, self._longest, self._done = wanted, longest, False

        def selected(logits: Tensor) -> Tensor:
            return logits.squeeze(0) if self._done else self._of(logits, wanted)

        try:
            yield selected
        finally:
            self._wanted = None


def _takes(parameters: Mapping[str, inspect.Parameter], name: str) -> bool:
    kinds = {p.kind for p in parameters.values()}
    return name in parameters or inspect.Parameter.VAR_KEYWORD in kinds


def divergence(base: Tensor, tuned: Tensor) -> Tensor:
    """KL(base || tuned) at each token in nats, float32, shape [tokens].

    Args:
        base: logits, shape [tokens, vocabulary].
        tuned: logits of the same shape.
    """
    each = kl_div(
        tuned.float().log_softmax(-1), base.float().log_softmax(-1),
        reduction="none", log_target=True,
    )  # fmt: skip
    return each.sum(-1)


def micro_batch_losses(module: nn.Module, micro_batch: MicroBatch) -> Tensor:
    """Losses of a micro-batch's labels, without gradient, shape [supervised]."""
    with torch.no_grad(), layout_context(micro_batch.layout):
        losses: MicroBatchLosses = module(micro_batch)
    return losses.tokens[: micro_batch.labels.numel()]


class EvaluationMode:
    """Evaluation mode of a module, for callers that switch often: submodules are collected once."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._parts = list(module.modules())
        self._blocks = decoder_blocks(module)

    @contextmanager
    def on(self) -> Iterator[None]:
        """The module in evaluation mode and uncompiled (each shape occurs once), for a while."""
        was = self._module.training
        self._set(False)
        try:
            with uncompiled(self._blocks):
                yield
        finally:
            self._set(was)

    def _set(self, training: bool) -> None:
        for part in self._parts:
            part.training = training


def evaluating(module: nn.Module) -> AbstractContextManager[None]:
    """The module in evaluation mode and uncompiled (each shape occurs once), for a while."""
    return EvaluationMode(module).on()
