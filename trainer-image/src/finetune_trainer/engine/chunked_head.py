"""The output head in chunks: losses without all logits in memory.

The logits of a micro-batch are its largest tensor: 4,096 supervised tokens of a vocabulary of
150,000 are 2.5 GB in float32, and their gradient is as large. Chunks, which the backward pass
computes again, bound that memory. They cost a second matrix product with the head.
"""

from __future__ import annotations

import copy
import logging
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from finetune_api.training import TokenWeighting
from finetune_trainer.engine.cross_entropy import token_losses

log = logging.getLogger(__name__)

CHUNK_BYTES: Final = 512 << 20
"""Logits of a chunk in float32. Smaller chunks are not worth the second matrix product."""


class ChunkedHead:
    """The losses of a language model's tokens, one chunk of tokens at a time.

    Args:
        model: the language model, without the adapter around it.
        limit: bytes of the logits of a chunk.
        plain: the result of ``has_plain_head`` before the model's kernels were fused; None:
            computed when a micro-batch first exceeds the limit.
    """

    def __init__(
        self, model: PreTrainedModel, limit: int = CHUNK_BYTES, plain: bool | None = None
    ) -> None:
        self._model: Any = model
        self._chunk_tokens = max(1, limit // (4 * model.config.get_text_config().vocab_size))
        self._is_plain = plain

    def applies(self, tokens: int) -> bool:
        """Whether the logits of so many tokens exceed a chunk, and can be computed in chunks."""
        return tokens > self._chunk_tokens and self.chunk_tokens() is not None

    def chunk_tokens(self) -> int | None:
        """Tokens of a chunk; None: the model's logits cannot be computed in chunks."""
        if self._is_plain is None:
            self._is_plain = has_plain_head(self._model)
        return self._chunk_tokens if self._is_plain else None

    def losses(
        self,
        inputs: dict[str, Tensor],
        predict: Tensor,
        labels: Tensor,
        smoothing: float,
        weighting: TokenWeighting,
    ) -> Tensor:
        """Negative log likelihood of each label in nats, float32, shape [supervised].

        Args:
            inputs: of the model.
            predict: positions whose next token is a label, shape [supervised].
            smoothing, weighting: see ``token_losses``.
        """
        hidden = self._model.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        head = self._model.get_output_embeddings()

        def part(hidden: Tensor, labels: Tensor) -> Tensor:
            return token_losses(head(hidden), labels, smoothing, weighting)

        supervised = hidden.index_select(0, predict)
        each = (torch.split(x, self._chunk_tokens) for x in (supervised, labels))
        found: list[Any] = [
            checkpoint(part, h, ids, use_reentrant=False) for h, ids in zip(*each, strict=True)
        ]
        return torch.cat(found)


def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether a model's logits are its head applied to its last hidden state, and nothing else.
    Some architectures scale either, or cap the logits. Found by running a copy on the meta device.

    Call before ``kernels.use_liger``: Liger changes the classes of the copy's modules, and its
    Triton kernels do not accept meta tensors.
    """
    with torch.device("meta"):
        config = copy.deepcopy(model.config)
        # Not the attention of packed documents, which reads the layout of a running micro-batch.
        empty: Any = type(model)._from_config(  # type: ignore[no-untyped-call]
            config, attn_implementation="eager"
        )
        ids = torch.zeros(1, 4, dtype=torch.long)
        mask = torch.zeros(1, 1, 4, 4)  # without a mask, transformers reads values to make one
    head, seen = empty.get_output_embeddings(), list[tuple[Tensor, Tensor]]()
    if head is None:
        return False
    head.register_forward_hook(lambda _, given, made: seen.append((given[0], made)))
    empty.base_model.register_forward_hook(lambda _, __, made: seen.append((made[0], made[0])))
    try:
        logits = empty(input_ids=ids, attention_mask=mask, use_cache=False).logits
    except Exception as error:  # the model's code reads values, which meta tensors lack
        log.info("a %s computes its logits without chunks: %s", type(model).__name__, error)
        return False
    (hidden, _), (given, made) = seen
    same = given.untyped_storage()._cdata == hidden.untyped_storage()._cdata
    return same and logits is made
