"""Texts to classify as samples: a text with the marks that the tokenizer itself puts around it, and
the label beside it, which is the one thing that is learned.

So a sample is what ``tokenizer(text)`` gives, in training and wherever the model is used later.
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
    """Tokens of the tokenizer's own at its end (`[SEP]`, say)."""

    @property
    def supervised(self) -> int:
        """The label."""
        return 1

    def shortened(self, limit: int, bos: int | None) -> tuple[TokenizedSample, Cut]:
        """Without the end of the text, before the marks."""
        kept, end = limit - self.marks, len(self.ids) - self.marks
        ids = np.concatenate([self.ids[:kept], self.ids[end:]])
        return replace(self, ids=ids, prompt_length=len(ids), gaps=((kept, end),)), "Text"


class Texts:
    """A tokenizer of texts to classify.

    Args:
        tokenizer: a transformers tokenizer.
        model: the model's address, for messages.
        vocabulary: rows of the model's embedding.

    Raises:
        UserError: 'NoPaddingToken' where there is no token to make texts equally long with.
    """

    def __init__(self, tokenizer: Any, model: str, vocabulary: int) -> None:
        if tokenizer.pad_token is None and tokenizer.eos_token is None:
            raise UserError(
                "NoPaddingToken",
                f"{model}: its tokenizer names neither pad_token nor eos_token, so texts cannot be"
                " classified side by side; set pad_token in tokenizer_config.json",
            )
        self._tokenizer = tokenizer
        self._model = model
        self._vocabulary = vocabulary
        self.bos_id: int | None = tokenizer.bos_token_id
        # Some encoders (RoBERTa) count positions from above 0: the configuration's number is more
        # than a text may have, the tokenizer's is right. A tokenizer without one says 1e30.
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
            complain: is told 'EmptyPrompt', naming the record.

        Raises:
            DataError: what ``complain`` raises.
            UserError: 'VocabularyMismatch' where a token is none of the model's.
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
        """Where the tokens of the text stand; its label has none."""
        begins = begins_of(self._tokenizer, example.prompt)
        return [Placed(self._marks - self._marks_at_end, begins)]

    def _encode(self, texts: list[str], *, marks: bool = True) -> list[list[int]]:
        # Not by the tokenizer's backend: files of encoders often ask it to pad and to truncate.
        encoded = self._tokenizer(
            texts, add_special_tokens=marks, padding=False, truncation=False, verbose=False
        )
        return list(encoded["input_ids"])
