"""The language of a text: a help to see what a source holds, no filter."""

from __future__ import annotations

import re
from functools import cache
from typing import Final

from py3langid.langid import MODEL_FILE, LanguageIdentifier

CHARACTERS: Final = 1000
LETTERS: Final = 20
"""Least letters of a text that is judged."""

SURE: Final = 0.5
"""Least probability of a language that is named."""

UNKNOWN: Final = "und"
"""ISO 639's code for text whose language is not known."""

_MARKS: Final = re.compile(r"<[^<>\s]{1,40}>")
"""Marks of HTML, and of chat templates in a text: they are of no language."""


def language_of(text: str) -> str:
    """ISO 639 code of a text's language; ``UNKNOWN`` where it is short or of no clear one."""
    text = _MARKS.sub(" ", text[:CHARACTERS])
    if sum(c.isalpha() for c in text) < LETTERS:
        return UNKNOWN
    language, probability = _identifier().classify(text)
    return str(language) if probability >= SURE else UNKNOWN


@cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
