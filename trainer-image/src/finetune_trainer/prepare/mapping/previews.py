"""Previews of samples as they are trained: which text is only read, which is supervised, and what
was cut off. The marks follow the tokens, not the text."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any, Final, Literal

import numpy as np

from finetune_trainer.personal import covered, uncovered
from finetune_trainer.prepare.tokenizing.tokens import TokenizedSample, Tokenizing

PREVIEW_CHARACTERS: Final = 2000
"""Maximum characters shown of a sample."""

_MORE: Final = " …"

State = Literal["Read", "Supervised", "Cut"]


def preview(sample: TokenizedSample, tokens: Tokenizing) -> dict[str, Any]:
    """Return the preview of a sample for ``report.json``: its parts in order. A part is a text that
    is ``supervised`` or not, or the number of tokens ``cut`` off there, which are in no
    sample. Special tokens that the tokenizer adds around a text are not shown, but count in
    ``cut``.

    Personal data is always masked, even where the samples keep it: more people read the report
    than the data. The mask is applied to the uncut text, so that no partial value remains.
    """
    states = _states(sample)
    texts = [""] * len(states)
    placed = tokens.placed(sample.example)
    for part, (first, begins) in zip(sample.example.segments, placed, strict=False):
        text = covered(part.text)
        edges = [0, *begins[1:], len(text)]  # text without a token goes with its neighbour
        for i in range(len(begins)):
            texts[first + i] = text[edges[i] : edges[i + 1]]
    parts: list[dict[str, Any]] = []
    for state, group in groupby(range(len(states)), key=states.__getitem__):
        stretch = list(group)
        if state == "Cut":
            parts.append({"text": "", "supervised": False, "cut": len(stretch)})
        elif text := uncovered("".join(texts[i] for i in stretch)):
            parts.append({"text": text, "supervised": state == "Supervised"})
    for part in sample.example.segments[len(placed) :]:
        parts.append({"text": uncovered(covered(part.text)), "supervised": part.supervised})
    most = _most(len(part["text"]) for part in parts)
    for shown in parts:
        if len(shown["text"]) > most:
            shown["text"] = shown["text"][:most] + _MORE
    return {"where": sample.example.where, "tokens": len(sample.ids), "parts": parts}


def _states(sample: TokenizedSample) -> list[State]:
    """The state of each token of the example."""
    gaps = sum(end - start for start, end in sample.gaps)
    kept = np.ones(len(sample.ids) + gaps, np.bool_)
    for start, end in sample.gaps:
        kept[start:end] = False
    learned = np.zeros(len(sample.ids), np.bool_)
    for start, end in sample.spans:
        learned[start:end] = True
    states: list[State] = ["Cut"] * len(kept)
    for position, is_learned in zip(np.flatnonzero(kept), learned, strict=True):
        states[position] = "Supervised" if is_learned else "Read"
    return states


def _most(lengths: Iterable[int]) -> int:
    """Limit of the characters of each text, so that all together take ``PREVIEW_CHARACTERS``. Long
    texts get what short ones leave: a long prompt does not hide the answer."""
    room, ordered = PREVIEW_CHARACTERS, sorted(lengths)
    for i, length in enumerate(ordered):
        share = room // (len(ordered) - i)
        if length > share:
            return share
        room -= length
    return PREVIEW_CHARACTERS
