"""Languages of a source, from some records of each part: a help to see what it holds, no filter."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Final

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from finetune_trainer.prepare.rendering.drafts import Draft

MOST: Final = 512
"""Records of a part that are looked at."""

OF_A_BATCH: Final = 16
"""Records of a batch that are looked at, so that they do not all come from the beginning."""

CHARACTERS: Final = 1000
LETTERS: Final = 20
"""Least letters of a text that is judged."""

SURE: Final = 0.5
"""Least probability of a language that is named."""

UNKNOWN: Final = "und"
"""ISO 639's code for text whose language is not known."""

_MARKS: Final = re.compile(r"<[^<>\s]{1,40}>")
"""Marks of HTML, and of chat templates in a text: they are of no language."""


class Languages:
    """Counts the languages of drafts."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        """Records by language (ISO 639 code)."""

    def look(self, drafts: Sequence[Draft]) -> None:
        """Count some of a batch."""
        room = min(OF_A_BATCH, MOST - self.counts.total())
        for draft in drafts[:: max(1, len(drafts) // OF_A_BATCH)][:room]:
            self.counts[language_of(draft.own)] += 1

    def to_json(self) -> dict[str, float]:
        """Share of each language (ISO 639 code), the largest first."""
        total = max(1, self.counts.total())
        return {name: round(n / total, 4) for name, n in self.counts.most_common()}


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
