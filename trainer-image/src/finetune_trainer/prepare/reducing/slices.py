"""Collects the values of the fields of ``evaluation.slices``, and keeps the most frequent ones.

Memory holds each distinct value once, and a number a field and test sample.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from finetune_trainer.prepared.slices import MOST_VALUES, NONE, OTHER, write_slices


class SliceValues:
    """Values of the test samples, added in the order of the test index.

    Args:
        fields: of ``evaluation.slices``.
    """

    def __init__(self, fields: Sequence[str]) -> None:
        self.fields = fields
        self._sets: array[int] = array("H")
        self._numbers: list[array[int]] = [array("I") for _ in fields]
        self._values: list[dict[str, int]] = [{} for _ in fields]

    def add(self, number: int, samples: Iterable[str]) -> None:
        """Add samples of a set.

        Args:
            number: of the set.
            samples: the values of each, as in the column ``slices`` of the statistics.
        """
        for sample in samples:
            self._sets.append(number)
            texts = json.loads(sample)
            for text, numbers, values in zip(texts, self._numbers, self._values, strict=True):
                numbers.append(values.setdefault(text, len(values)))

    def write(self, path: Path) -> None:
        """Write ``slices.arrow``."""
        columns: dict[str, Any] = {}
        for field, numbers, values in zip(self.fields, self._numbers, self._values, strict=True):
            texts = list(values)
            columns[field] = most_frequent(self._sets, [texts[n] for n in numbers])
        write_slices(path, columns)


def most_frequent(sets: Sequence[int], values: Sequence[str]) -> list[str]:
    """Return the values with OTHER in place of those that are not among the ``MOST_VALUES`` most
    frequent of their set; of equally frequent ones, the first in the order of the alphabet stay.

    Args:
        sets: number of the set of each.
    """
    counts: dict[int, Counter[str]] = {}
    for number, value in zip(sets, values, strict=True):
        counts.setdefault(number, Counter())[value] += 1
    kept = {}
    for number, counted in counts.items():
        counted.pop(NONE, None)
        ordered = sorted(counted, key=lambda value: (-counted[value], value))
        kept[number] = {NONE, *ordered[:MOST_VALUES]}
    pairs = zip(sets, values, strict=True)
    return [value if value in kept[number] else OTHER for number, value in pairs]
