"""Log-likelihoods of labels after prompts: a prompt is computed once for all labels.

    prompts ─(one pass)─► first tokens of all labels ──────────────────────────────────┐
                 └─► KV cache, once for each row of further tokens ─(one pass)─► others ┴─► sums

Labels of one token need no second pass. Labels that differ only in their last token share a row.
Where the cache cannot be copied (recurrent states, virtual tokens), prompts and rows are computed
whole.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any, Final

import torch
from peft import PeftModel
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from finetune_trainer.evaluate.label_scores import Tokens
from finetune_trainer.evaluate.prompt_batches import MOST_TOKENS, Ids, padded

_LOGITS: Final = 1 << 27
"""Logits in memory together: half a gigabyte in float32."""
_COPIED: Final = (DynamicLayer, DynamicSlidingWindowLayer)


def rows_of(labels: Sequence[Tokens]) -> list[Tokens]:
    """Return the rows of tokens that are put to the model behind a prompt: all but the last token
    of each label, without those that another row begins with."""
    rows: list[Tokens] = []
    for row in sorted({label[:-1] for label in labels if len(label) > 1}, reverse=True):
        if not any(_begins(row, other) for other in rows):
            rows.append(row)
    return rows


def _begins(row: Tokens, other: Tokens) -> bool:
    return other[: len(row)] == row


class LabelLikelihoods:
    """Computes log-likelihoods with a causal language model, in as many passes for every batch.

    Args:
        model: a transformers model, or one under peft.
        labels: tokens of each label.
        longest: tokens of the longest prompt.
        padding: token of padding.
        virtual: whether the tuning method puts virtual tokens before each prompt.
    """

    def __init__(
        self, model: Any, device: torch.device, labels: Sequence[Tokens], longest: int,
        padding: int, *, virtual: bool,
    ) -> None:  # fmt: skip
        inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        accepted = inspect.signature(inner.forward).parameters
        self._model, self._labels = model, labels
        self._device, self._padding, self._virtual = device, padding, virtual
        self._selects = "logits_to_keep" in accepted
        self._places = "position_ids" in accepted and not virtual
        self._rows = rows_of(labels)
        self.more: Final = max(map(len, self._rows), default=0)
        """Tokens of the longest row: those that a prompt needs room for."""
        logits = max(1, self.more) * int(inner.get_input_embeddings().num_embeddings)
        most = max(1, min(MOST_TOKENS // (longest + self.more), _LOGITS // logits))
        self._parts = [self._rows[at : at + most] for at in range(0, len(self._rows), most)]
        self.copies: Final = max(map(len, self._parts), default=1)
        """Copies of a prompt's keys and values that are in memory together."""

    def __call__(self, prompts: Sequence[Ids]) -> list[list[float]]:
        """Return the log-likelihoods of the labels in nats, for each prompt.

        Args:
            prompts: tokens of each; with virtual tokens, of one length.
        """
        ids, mask = padded(prompts, self._padding, self._device)
        first, cache = self._first(ids, mask)
        found = first.log_softmax(-1)[:, [label[0] for label in self._labels]]
        for part in self._parts:
            scores = self._further(ids, mask, cache, part)
            for at, row in enumerate(part):
                for number, label in enumerate(self._labels):
                    if len(label) > 1 and self._row_of(label) == row:
                        further = scores[:, at, range(len(label) - 1), label[1:]]
                        found[:, number] += further.sum(1)
        values: list[list[float]] = found.double().tolist()
        return values

    def _row_of(self, label: Tokens) -> Tokens:
        return next(row for row in self._rows if _begins(label[:-1], row))

    def _first(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Cache | None]:
        """Logits behind the prompts, float32, shape [prompts, vocabulary], and their cache; None:
        there is no further row, or it cannot be copied."""
        caches = bool(self._rows) and not self._virtual
        out = self._forward(ids, mask, 1, use_cache=caches)
        cache = out.past_key_values if caches else None
        copied = isinstance(cache, Cache) and all(type(x) in _COPIED for x in cache.layers)
        return out.logits[:, -1].float(), cache if copied else None

    def _further(
        self, ids: Tensor, mask: Tensor, cache: Cache | None, rows: Sequence[Tokens]
    ) -> Tensor:
        """Log-likelihoods of all tokens behind each token of some rows, float32, shape
        [prompts, rows, tokens, vocabulary]."""
        longest = max(map(len, rows))
        texts = [(*row, *[self._padding] * (longest - len(row))) for row in rows]
        there = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        new, new_mask = (
            torch.tensor(each, device=ids.device).repeat(len(ids), 1) for each in (texts, there)
        )
        whole_mask = torch.cat([mask.repeat_interleave(len(rows), 0), new_mask], 1)
        if cache is None:
            whole = torch.cat([ids.repeat_interleave(len(rows), 0), new], 1)
            out = self._forward(whole, whole_mask, longest, use_cache=False)
        else:
            branch = _copy(cache, len(rows))
            out = self._forward(new, whole_mask, longest, use_cache=True, past_key_values=branch)
        found: Tensor = out.logits[:, -longest:].float().log_softmax(-1)
        return found.reshape(len(ids), len(rows), longest, -1)

    def _forward(self, ids: Tensor, mask: Tensor, kept: int, **options: Any) -> Any:
        """Args:
        mask: of the cached tokens, too.
        kept: last tokens whose logits are needed.
        """
        if self._selects:
            options["logits_to_keep"] = kept
        if self._places:
            positions = mask.cumsum(1).sub(1).clamp(min=0)
            options["position_ids"] = positions[:, -ids.shape[1] :]
        return self._model(input_ids=ids, attention_mask=mask, **options)


def _copy(cache: Cache, times: int) -> Cache:
    """A cache with every document several times. It grows apart from the first one: layers replace
    their tensors."""
    branch = copy.copy(cache)
    branch.layers = [copy.copy(layer) for layer in cache.layers]
    branch.batch_repeat_interleave(times)
    return branch
