"""Choice of the examples in front of a test prompt (few-shot). Pure: of the samples and their
order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from finetune_trainer.prepared.dataset import AnsweredPrompt

SHINGLE: Final = 3
"""Tokens of a shingle."""
SIMILAR: Final = 0.5
"""Jaccard similarity of two prompts' shingles from which they are near duplicates: the example
would give the answer away."""
_COMMON: Final = 0.5
"""Share of the examples from which a shingle belongs to the template, and tells nothing."""

Ids = npt.NDArray[np.int32]
Shingles = frozenset[tuple[int, ...]]


class Pool:
    """Examples of one draw.

    Args:
        examples: in the order of the draw. Labels take turns, so that few examples show many.
    """

    def __init__(self, examples: Sequence[AnsweredPrompt]) -> None:
        self._examples = list(_by_turns(examples))
        found = [shingles_of(e.ids[: e.prompt_length]) for e in self._examples]
        counts = Counter(shingle for each in found for shingle in each)
        self._common = frozenset(s for s, n in counts.items() if n > _COMMON * len(found))
        self._shingles = [each - self._common for each in found]

    def choose(self, count: int, question: Ids) -> list[AnsweredPrompt]:
        """Return the first examples that are no near duplicates of a question; fewer if the pool
        has no more."""
        asked, chosen = shingles_of(question), list[AnsweredPrompt]()
        for example, shingles in zip(self._examples, self._shingles, strict=True):
            if len(chosen) == count:
                break
            if similarity(shingles, asked - self._common) < SIMILAR:
                chosen.append(example)
        return chosen


def _by_turns(examples: Sequence[AnsweredPrompt]) -> Iterator[AnsweredPrompt]:
    by_label: dict[str | None, list[AnsweredPrompt]] = {}
    for example in examples:
        by_label.setdefault(example.label, []).append(example)
    for turn in range(max(map(len, by_label.values()), default=0)):
        for listed in by_label.values():
            yield from listed[turn : turn + 1]


def shingles_of(ids: Ids) -> Shingles:
    """Return the distinct runs of SHINGLE tokens; the whole text where it is shorter."""
    tokens = ids.tolist()
    last = max(1, len(tokens) - SHINGLE + 1)
    return frozenset(tuple(tokens[i : i + SHINGLE]) for i in range(last))


def similarity(one: Shingles, other: Shingles) -> float:
    """Jaccard similarity of two sets of shingles; 1 of two that are empty."""
    union = len(one | other)
    return len(one & other) / union if union else 1.0
