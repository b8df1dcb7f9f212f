"""Language identification, for the data report only: samples are not filtered by language."""

from __future__ import annotations

import re
from functools import cache
from typing import Final

from py3langid.langid import MODEL_FILE, LanguageIdentifier

CHARACTERS: Final = 1000
"""Characters of a text that are classified."""

LETTERS: Final = 20
"""Minimum letters of a text."""

SURE: Final = 0.5
"""Minimum probability of the language."""

UNKNOWN: Final = "und"
"""ISO 639 code for an undetermined language."""

_MARKS: Final = re.compile(r"<[^<>\s]{1,40}>")
"""HTML tags and special tokens of chat templates, removed before classification."""


def language_of(text: str) -> str:
    """Return the ISO 639 code of a text's language; ``UNKNOWN`` if the text is short or the
    language unclear."""
    text = _MARKS.sub(" ", text[:CHARACTERS])
    if sum(c.isalpha() for c in text) < LETTERS:
        return UNKNOWN
    language, probability = _identifier().classify(text)
    return str(language) if probability >= SURE else UNKNOWN


@cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
