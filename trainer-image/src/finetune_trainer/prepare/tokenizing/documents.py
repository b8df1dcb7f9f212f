"""Splits documents that are longer than a sample into several samples, so that all of the text is
trained on.

Each piece has the begin token; only the last has the end token, so that the model learns to stop
where the document ends. A document is split at paragraphs, lines, sentences or words, in this order
of preference.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Final

from finetune_trainer.failures import DataError
from finetune_trainer.personal import covered
from finetune_trainer.prepare.rendering.examples import RenderedExample, Segment
from finetune_trainer.prepare.tokenizing.tokens import TokenizedSample, Tokenizing

_BREAKS: Final = ("\n\n", "\n", ". ", "。", " ")
"""Separators after which a text is split, in order of preference."""


def is_document(example: RenderedExample) -> bool:
    """Whether an example is text that is supervised as a whole."""
    return len(example.segments) == 1


def split(example: RenderedExample, tokens: Tokenizing, limit: int) -> list[TokenizedSample]:
    """Split a document into samples of at most ``limit`` tokens.

    The first sample keeps the personal data counts. Personal data is not split where the text can
    be split next to it, since the report could not show a partial value in a piece.
    """
    (placed,) = tokens.placed(example)
    text = example.segments[0].text
    shown = covered(text)
    room = max(1, limit - placed.first - 1)
    while True:
        ends = borders(shown, placed.begins, room)
        samples = tokens.samples(_examples(example, text, ends), _pass_over)
        longest = max((len(sample.ids) for sample in samples), default=0)
        if longest <= limit or room == 1:
            return samples
        # A piece may have more tokens by itself than within the document: one more at a border, and
        # many more where a slow tokenizer only estimates the token offsets.
        room = max(1, room * limit // longest)


def borders(text: str, begins: Sequence[int], room: int) -> list[int]:
    """Return the ends of consecutive pieces of a text, of at most ``room`` tokens each. Pieces have
    about equal lengths where the text has no separators.

    Args:
        begins: start character of each token, ascending.
    """
    found: list[int] = []
    start = first = 0  # first character and token of the next piece
    while (left := len(begins) - first) > room:
        wanted = -(-left // room)
        aim, most = begins[first + -(-left // wanted)], begins[first + room]
        start = max(start + 1, _break(text, (start + aim) // 2, most) or aim)
        found.append(start)
        first = bisect_left(begins, start)
        if first == len(begins) or begins[first] != start:
            first -= 1  # this token spans the border
    return [*found, len(text)] if start < len(text) else found


def _break(text: str, low: int, high: int) -> int | None:
    """Return the best split position between two characters; None without a separator."""
    for mark in _BREAKS:
        at = text.rfind(mark, low, high)
        if at >= 0:
            return at + len(mark)
    return None


def _examples(example: RenderedExample, text: str, ends: Sequence[int]) -> list[RenderedExample]:
    """Return an example per piece, except pieces of white space. Trailing spaces are removed: in
    most vocabularies they belong to the next word, and would be trained as separate tokens."""
    texts = [text[a:b] for a, b in pairwise([0, *ends])]
    texts = [*(piece.rstrip(" ") for piece in texts[:-1]), texts[-1]]
    texts = [piece for piece in texts if piece.strip()]
    return [
        replace(
            example,
            where=f"{example.where}, piece {number} of {len(texts)}",
            segments=(Segment(piece, True),),
            completion=piece,
            own=piece,
            continues=number < len(texts),
            personal=example.personal if number == 1 else {},
        )
        for number, piece in enumerate(texts, start=1)
    ]


def _pass_over(error: DataError) -> None:
    """Ignore a piece without tokens: the other pieces hold the document's tokens."""
