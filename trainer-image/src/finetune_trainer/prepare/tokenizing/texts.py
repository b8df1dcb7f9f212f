"""Tokenizes texts to classify: a text with the tokenizer's special tokens, and its label, which is
the only supervised part.

A sample equals ``tokenizer(text)``, in training and in later use of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from finetune_trainer.failures import DataError, UserError
from finetune_trainer.prepare.reading.faults import Complain, refuse
from finetune_trainer.prepare.rendering.examples import RenderedExample
from finetune_trainer.prepare.tokenizing.tokens import (
    Cut,
    Placed,
    TokenizedSample,
    begins_of,
    check_vocabulary,
)

_PROBE: Final = "a b"
_NO_BOUND: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class LabelledText(TokenizedSample):
    """A tokenized text with a label."""

    marks: int
    """Number of special tokens at its end (such as `[SEP]`)."""

    @property
    def supervised(self) -> int:
        """Number of supervised items: one label."""
        return 1

    def shortened(self, limit: int, bos: int | None) -> tuple[TokenizedSample, Cut]:
        """Cut off the end of the text, before the special tokens."""
        kept, end = limit - self.marks, len(self.ids) - self.marks
        ids = np.concatenate([self.ids[:kept], self.ids[end:]])
        return replace(self, ids=ids, prompt_length=len(ids), gaps=((kept, end),)), "Text"


class Texts:
    """Tokenizes texts to classify.

    Args:
        tokenizer: a transformers tokenizer.
        model: the model's address, for messages.
        vocabulary: rows of the model's embedding.

    Raises:
        UserError: 'NoPaddingToken', the tokenizer has no token for padding.
    """

    def __init__(self, tokenizer: Any, model: str, vocabulary: int) -> None:
        if tokenizer.pad_token is None and tokenizer.eos_token is None:
            raise UserError(
                "NoPaddingToken",
                f"{model}: its tokenizer has neither pad_token nor eos_token, so texts cannot be"
                " padded to a batch; set pad_token in tokenizer_config.json",
            )
        self._tokenizer = tokenizer
        self._model = model
        self._vocabulary = vocabulary
        self.bos_id: int | None = tokenizer.bos_token_id
        # Some encoders (RoBERTa) start positions above 0: max_position_embeddings exceeds the
        # usable length, model_max_length is right. It is 1e30 if unset.
        bound = tokenizer.model_max_length
        self.longest: int | None = bound if bound < _NO_BOUND else None
        plain, marked = self._encode([_PROBE], marks=False)[0], self._encode([_PROBE])[0]
        self._marks = len(marked) - len(plain)
        self._marks_at_end = next(
            (
                len(marked) - start - len(plain)
                for start in range(self._marks + 1)
                if marked[start : start + len(plain)] == plain
            ),
            0,
        )

    def samples(
        self, examples: Sequence[RenderedExample], complain: Complain = refuse
    ) -> list[TokenizedSample]:
        """Tokenize a batch of examples.

        Args:
            complain: called with 'EmptyPrompt' errors, which name the record.

        Raises:
            DataError: from ``complain``.
            UserError: 'VocabularyMismatch', the model has no embedding for a token.
        """
        samples: list[TokenizedSample] = []
        for example, ids in zip(examples, self._encode([d.prompt for d in examples]), strict=True):
            if len(ids) <= self._marks:
                complain(
                    DataError(
                        "EmptyPrompt", f"{example.where}: its text has no token; correct the record"
                    )
                )
            else:
                check_vocabulary(ids, self._vocabulary, self._model)
                samples.append(
                    LabelledText(example, np.array(ids, np.int32), (), len(ids), self._marks_at_end)
                )
        return samples

    def placed(self, example: RenderedExample) -> list[Placed]:
        """Positions of the tokens of the text; the label has no tokens."""
        begins = begins_of(self._tokenizer, example.prompt)
        return [Placed(self._marks - self._marks_at_end, begins)]

    def _encode(self, texts: list[str], *, marks: bool = True) -> list[list[int]]:
        # Not by the tokenizer's backend: encoders' files often enable padding and truncation.
        encoded = self._tokenizer(
            texts, add_special_tokens=marks, padding=False, truncation=False, verbose=False
        )
        return list(encoded["input_ids"])
