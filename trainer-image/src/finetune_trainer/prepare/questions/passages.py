"""Retrieval of passages for a test prompt: BM25 (Robertson and Zaragoza 2009), by bm25s."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from finetune_api.evaluation import Passages
from finetune_trainer.failures import DataError
from finetune_trainer.prepare.reading.records import read_records
from finetune_trainer.prepare.reading.sources import resolve
from finetune_trainer.prepare.rendering.formats import text_value
from finetune_trainer.storage.objects import Stores

MOST_PASSAGES: Final = 1_000_000
"""Passages that prepare indexes in memory."""


class Retriever:
    """Finds the passages that fit a text best.

    Args:
        passages: texts, at least one.
    """

    def __init__(self, passages: Sequence[str]) -> None:
        import bm25s

        self._passages = passages
        self._tokenize: Any = bm25s.tokenize
        self._index = bm25s.BM25()
        self._index.index(self._words(passages), show_progress=False)

    def find(self, texts: Sequence[str], top: int) -> list[list[str]]:
        """Return the best passages for each text, best first, without those that share no word
        with the text."""
        top = min(top, len(self._passages))
        numbers, scores = self._index.retrieve(self._words(texts), k=top, show_progress=False)
        return [
            [self._passages[number] for number, score in zip(*row, strict=True) if score > 0]
            for row in zip(numbers.tolist(), scores.tolist(), strict=True)
        ]

    def _words(self, texts: Sequence[str]) -> Any:
        # Without the package's English stop words: BM25 weighs frequent words of any language down.
        return self._tokenize(list(texts), stopwords=None, show_progress=False)


def read_passages(spec: Passages, stores: Stores) -> list[str]:
    """Read the passages of a spec.

    Raises:
        UserError: 'NoObjects', as ``resolve``.
        DataError: a faulty record, with object and line; 'NoPassages'; 'TooManyPassages'.
    """
    found: list[str] = []
    for item in resolve(spec.source, stores.of(spec.storage)):
        with item.open() as stream:
            for record in read_records(item.uri, stream):
                found.append(text_value(record, "text"))
                if len(found) > MOST_PASSAGES:
                    raise DataError(
                        "TooManyPassages",
                        f"spec.evaluation.passages.source: {spec.source} has more than"
                        f" {MOST_PASSAGES:,} passages; give those that the test needs",
                    )
    if not found:
        raise DataError(
            "NoPassages",
            f"spec.evaluation.passages.source: {spec.source} holds no record; each record is"
            ' {"text": "a passage"}',
        )
    return found


def shown(passages: Sequence[str]) -> str:
    """The passages as a text in front of a prompt, numbered as in format Retrieval."""
    return "\n\n".join(f"[{number}] {passage}" for number, passage in enumerate(passages, start=1))
