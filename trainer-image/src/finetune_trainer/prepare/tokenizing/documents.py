"""Documents that are longer than a sample may be: split into several, so that all of the text is
learned.

Each piece begins as a text does; only the last ends as one does, so that a model learns to stop
where the document stops. A document is parted where its text allows it best.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Final

from finetune_trainer.failures import DataError
from finetune_trainer.prepare.quality.personal import covered
from finetune_trainer.prepare.rendering.examples import RenderedExample, Segment
from finetune_trainer.prepare.tokenizing.tokens import TokenizedSample, Tokenizing

_BREAKS: Final = ("\n\n", "\n", ". ", "。", " ")
"""Behind which of them a text is parted: the first that is there."""


def is_document(example: RenderedExample) -> bool:
    """Whether an example is text that is learned as a whole."""
    return len(example.segments) == 1


def split(example: RenderedExample, tokens: Tokenizing, limit: int) -> list[TokenizedSample]:
    """A document as samples of at most ``limit`` tokens.

    What is counted of its personal data stays with the first. No such datum is parted where the
    text can be parted beside it: no report could tell that half of one is in a piece.
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
        # By itself a piece may have more tokens than it had in the document: one more at a border,
        # and more by far where the tokenizer could only guess where its tokens are.
        room = max(1, room * limit // longest)


def borders(text: str, begins: Sequence[int], room: int) -> list[int]:
    """Where consecutive pieces of a text end, each of at most ``room`` tokens, and of like lengths
    where there is nothing to part it behind.

    Args:
        begins: character at which each token begins, ascending.
    """
    found: list[int] = []
    start = first = 0  # character and token that the next piece begins with
    while (left := len(begins) - first) > room:
        wanted = -(-left // room)
        aim, most = begins[first + -(-left // wanted)], begins[first + room]
        start = max(start + 1, _break(text, (start + aim) // 2, most) or aim)
        found.append(start)
        first = bisect_left(begins, start)
        if first == len(begins) or begins[first] != start:
            first -= 1  # this token lies on both sides
    return [*found, len(text)] if start < len(text) else found


def _break(text: str, low: int, high: int) -> int | None:
    """Where it is best to part a text between two characters; None: nowhere better than
    elsewhere."""
    for mark in _BREAKS:
        at = text.rfind(mark, low, high)
        if at >= 0:
            return at + len(mark)
    return None


def _examples(example: RenderedExample, text: str, ends: Sequence[int]) -> list[RenderedExample]:
    """An example of each piece, but of white space alone. Spaces that a piece ends with belong to
    the word behind them in most vocabularies, and would be learned as a token of their own."""
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
            goes_on=number < len(texts),
            personal=example.personal if number == 1 else {},
        )
        for number, piece in enumerate(texts, start=1)
    ]


def _pass_over(error: DataError) -> None:
    """A piece without a token: the others have the document's."""
