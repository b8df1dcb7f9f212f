"""Documents that are longer than a sample may be: split into several, so that all of the text is
learned.

Each piece begins as a text does; only the last ends as one does, so that a model learns to stop
where the document stops. A document is parted where its text allows it best.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from finetune_trainer.prepare.rendering.drafts import Draft, Part
from finetune_trainer.prepare.tokenizing.tokens import Tokenizing

_BREAKS: Final = ("\n\n", "\n", ". ", "。", " ")
"""Behind which of them a text is parted: the first that is there."""


def is_document(draft: Draft) -> bool:
    """Whether a draft is text that is learned as a whole."""
    return len(draft.parts) == 1


def pieces(draft: Draft, tokens: Tokenizing, limit: int) -> list[Draft]:
    """A document as drafts of about ``limit`` tokens at most; one piece tokenized by itself may
    have a token more where there was no word to part it behind.

    What is counted of the document's personal data stays with the first piece. Of white space
    alone, which some tokenizers have no token for, no piece is made.
    """
    (placed,) = tokens.placed(draft)
    found = parted(draft.parts[0].text, placed.begins, max(1, limit - placed.first - 1))
    texts = [text for text in found if text.strip()]
    return [
        replace(
            draft,
            where=f"{draft.where}, piece {number} of {len(texts)}",
            parts=(Part(text, True),),
            completion=text,
            own=text,
            goes_on=number < len(texts),
            personal=draft.personal if number == 1 else {},
        )
        for number, text in enumerate(texts, start=1)
    ]


def parted(text: str, begins: Sequence[int], room: int) -> list[str]:
    """A text in consecutive pieces of at most ``room`` tokens, of like lengths where there is
    nothing to part it behind.

    Args:
        begins: character at which each token begins, ascending.
    """
    found: list[str] = []
    start = first = 0  # character and token that the next piece begins with
    while (left := len(begins) - first) > room:
        wanted = -(-left // room)
        aim, most = begins[first + -(-left // wanted)], begins[first + room]
        end = max(start + 1, _break(text, (start + aim) // 2, most) or aim)
        found.append(text[start:end])
        start = end
        first = bisect_left(begins, end)
        if first == len(begins) or begins[first] != end:
            first -= 1  # this token lies on both sides
    return [*found, text[start:]] if start < len(text) else found


def _break(text: str, low: int, high: int) -> int | None:
    """Where it is best to part a text between two characters; None: nowhere better than
    elsewhere."""
    for mark in _BREAKS:
        at = text.rfind(mark, low, high)
        if at >= 0:
            return at + len(mark)
    return None
