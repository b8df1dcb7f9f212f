"""The output head in chunks: losses without all logits at once.

Logits of a row are the biggest tensor of all: 4,096 supervised tokens of a vocabulary of 150,000
are 2.5 GB in 32 bits, and as much again for their gradient. In chunks, each of which is computed
again on the way back, they are bounded; that costs one more product with the head.
"""

from __future__ import annotations

import copy
import logging
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

log = logging.getLogger(__name__)

CHUNK_BYTES: Final = 512 << 20
"""Logits of a chunk in 32 bits; fewer are not worth the second product."""


def token_losses(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Negative log likelihood of each label in nats, float32, shape [supervised].

    Args:
        logits: shape [supervised, vocabulary].
        smoothing: share of the target's probability that is spread over the vocabulary.
    """
    if smoothing:
        return cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)
    losses: Tensor = _TokenLosses.apply(logits.float(), labels)
    return losses


class _TokenLosses(torch.autograd.Function):
    """Cross entropy whose gradient is made in place of the log probabilities: PyTorch's fills a
    tensor of zeros of the logits' size for it, and reads it twice."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        """[supervised, vocabulary], [supervised] → [supervised]."""
        log_probabilities = logits.log_softmax(-1)
        ctx.save_for_backward(log_probabilities, labels)
        return -log_probabilities.gather(-1, labels[:, None]).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        log_probabilities, labels = ctx.saved_tensors
        grad = grads[0][:, None]
        found = log_probabilities.exp_().mul_(grad)
        return found.scatter_add_(-1, labels[:, None], -grad), None


class ChunkedHead:
    """The losses of a language model's tokens, some at a time.

    Args:
        model: the language model, within force adapts it.
        limit: bytes of the logits of a chunk.
        plain: what ``has_plain_head`` said of the model before its kernels were fused; None: asked
            when a row first has too many logits.
    """

    def __init__(
        self, model: PreTrainedModel, limit: int = CHUNK_BYTES, plain: bool | None = None
    ) -> None:
        self._model: Any = model
        self._at_once = max(1, limit // (4 * model.config.get_text_config().vocab_size))
        self._is_plain = plain

    def wanted(self, tokens: int) -> bool:
        """Whether so many tokens' logits are too many for once, and can be had in chunks."""
        return tokens > self._at_once and self.most() is not None

    def most(self) -> int | None:
        """Tokens whose logits are there at a time; None: they cannot be had in chunks."""
        if self._is_plain is None:
            self._is_plain = has_plain_head(self._model)
        return self._at_once if self._is_plain else None

    def losses(
        self, inputs: dict[str, Tensor], predict: Tensor, labels: Tensor, smoothing: float
    ) -> Tensor:
        """Negative log likelihood of each label in nats, float32, shape [supervised].

        Args:
            inputs: of the model.
            predict: positions whose next token is a label, shape [supervised].
            smoothing: see ``training.labelSmoothing``.
        """
        hidden = self._model.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        head = self._model.get_output_embeddings()

        def part(hidden: Tensor, labels: Tensor) -> Tensor:
            return token_losses(head(hidden), labels, smoothing)

        supervised = hidden.index_select(0, predict)
        each = (torch.split(x, self._at_once) for x in (supervised, labels))
        found: list[Any] = [
            checkpoint(part, h, ids, use_reentrant=False) for h, ids in zip(*each, strict=True)
        ]
        return torch.cat(found)


def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether a model's logits are what its head makes of what its body gives, and no more: some
    architectures scale either, or cap the logits. Seen on an empty copy.

    Ask before ``kernels.use_liger``: Liger changes the classes that the copy is made of, and its
    kernels (Triton) take no tensors of the meta device.
    """
    with torch.device("meta"):
        config = copy.deepcopy(model.config)
        # Not by the attention of rows: one may be in work.
        empty: Any = type(model)._from_config(  # type: ignore[no-untyped-call]
            config, attn_implementation="eager"
        )
        ids = torch.zeros(1, 4, dtype=torch.long)
        mask = torch.zeros(1, 1, 4, 4)  # a whole one: transformers would look at values for it
    head, seen = empty.get_output_embeddings(), list[tuple[Tensor, Tensor]]()
    if head is None:
        return False
    head.register_forward_hook(lambda _, given, made: seen.append((given[0], made)))
    empty.base_model.register_forward_hook(lambda _, __, made: seen.append((made[0], made[0])))
    try:
        logits = empty(input_ids=ids, attention_mask=mask, use_cache=False).logits
    except Exception as error:  # its code looks at values, which are not there
        log.info("a %s has all its logits at once: %s", type(model).__name__, error)
        return False
    (hidden, _), (given, made) = seen
    same = given.untyped_storage()._cdata == hidden.untyped_storage()._cdata
    return same and logits is made
