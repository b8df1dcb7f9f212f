"""Log-likelihoods of labels after prompts: a prompt is computed once for all labels.

    prompts ─(one pass)─► first tokens of all labels ──────────────────────────────────┐
                 └─► KV cache, once for each row of further tokens ─(one pass)─► others ┴─► sums

Labels of one token need no second pass. Labels that differ only in their last token share a row.
Where the cache cannot be copied (recurrent states, virtual tokens), prompts and rows are computed
whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from finetune_trainer.evaluate.cached_model import CachedModel, ReadPrompts, branch
from finetune_trainer.evaluate.label_scores import Tokens
from finetune_trainer.evaluate.prompt_batches import MOST_TOKENS, Ids, padded

_LOGITS: Final = 1 << 27
"""Logits in memory together: half a gigabyte in float32."""


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
        labels: tokens of each label.
        longest: tokens of the longest prompt.
    """

    def __init__(self, model: CachedModel, labels: Sequence[Tokens], longest: int) -> None:
        self._model, self._labels = model, labels
        self._rows = rows_of(labels)
        self.more: Final = max(map(len, self._rows), default=0)
        """Tokens of the longest row: those that a prompt needs room for."""
        logits = max(1, self.more) * model.vocabulary
        most = max(1, min(MOST_TOKENS // (longest + self.more), _LOGITS // logits))
        self._parts = [self._rows[at : at + most] for at in range(0, len(self._rows), most)]
        self.copies: Final = max(map(len, self._parts), default=1)
        """Copies of a prompt's keys and values that are in memory together."""

    def __call__(self, prompts: Sequence[Ids]) -> list[list[float]]:
        """Return the log-likelihoods of the labels in nats, for each prompt.

        Args:
            prompts: tokens of each; with virtual tokens, of one length.
        """
        read = self._model.read(prompts, self.more, keep=bool(self._rows))
        found = read.logits.log_softmax(-1)[:, [label[0] for label in self._labels]]
        for part in self._parts:
            scores = self._further(prompts, read, part)
            for at, row in enumerate(part):
                for number, label in enumerate(self._labels):
                    if len(label) > 1 and self._row_of(label) == row:
                        further = scores[:, at, range(len(label) - 1), label[1:]]
                        found[:, number] += further.sum(1)
        values: list[list[float]] = found.double().tolist()
        return values

    def _row_of(self, label: Tokens) -> Tokens:
        return next(row for row in self._rows if _begins(label[:-1], row))

    def _further(self, prompts: Sequence[Ids], read: ReadPrompts, rows: Sequence[Tokens]) -> Tensor:
        """Log-likelihoods of all tokens behind each token of some rows, float32, shape
        [prompts, rows, tokens, vocabulary]."""
        longest = max(map(len, rows))
        padding, device = self._model.padding, read.mask.device
        texts = [(*row, *[padding] * (longest - len(row))) for row in rows]
        there = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        ids, mask = (
            torch.tensor(each, device=device).repeat(len(prompts), 1) for each in (texts, there)
        )
        mask = torch.cat([read.mask.repeat_interleave(len(rows), 0), mask], 1)
        if read.cache is None:
            before = padded(prompts, padding, device)[0].repeat_interleave(len(rows), 0)
            out = self._model(torch.cat([before, ids], 1), mask, longest, use_cache=False)
        else:
            copies = branch(read.cache, len(rows))
            out = self._model(ids, mask, longest, use_cache=True, past_key_values=copies)
        found: Tensor = out.logits[:, -longest:].float().log_softmax(-1)
        return found.reshape(len(prompts), len(rows), longest, -1)
