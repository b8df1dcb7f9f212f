"""What happens to a sample of more tokens than ``training.maxLength``: a pure function."""

from __future__ import annotations

from dataclasses import replace
from typing import Final, Literal, get_args

import numpy as np

from finetune_trainer.failures import DataError
from finetune_trainer.prepare.tokens import Sample

Cut = Literal["None", "Prompt", "Completion", "Dropped"]
"""What was cut off: nothing, the beginning of the prompt, also the end of the completion, all."""

CUTS: Final[tuple[Cut, ...]] = get_args(Cut)


def fit(sample: Sample, limit: int, policy: str, bos: int | None) -> tuple[Sample | None, Cut]:
    """The sample in at most ``limit`` tokens (None: left out), and what that took.

    Truncate cuts behind the beginning-of-sequence token, so that the model still sees one, and up
    to the last learned stretch. Where that is too long by itself, one token of the prompt stays (an
    answer needs something to begin from) and the end of the stretch goes.

    Raises:
        DataError: 'Overlength' under policy Fail, naming record, length and limit.
    """
    length = len(sample.ids)
    if length <= limit:
        return sample, "None"
    if policy == "Fail":
        raise DataError(
            "Overlength",
            f"{sample.draft.where}: {length} tokens, but training.maxLength is {limit}; shorten the"
            " record, raise training.maxLength, or set data.quality.overlength to Truncate or Drop",
        )
    if policy == "Drop":
        return None, "Dropped"
    keep = 1 if bos is not None and sample.prompt_length and sample.ids[0] == bos else 0
    least = min(sample.prompt_length, keep + 1)
    answer = length - sample.prompt_length
    prompt = max(least, limit - answer)
    dropped = sample.prompt_length - prompt
    ids = np.concatenate([sample.ids[:keep], sample.ids[keep + dropped :]])[:limit]
    spans = tuple(
        (max(keep, 1, start - dropped), min(end - dropped, limit))
        for start, end in sample.spans
        if end - dropped > max(keep, 1)
    )
    cut: Cut = "Prompt" if prompt + answer <= limit else "Completion"
    return replace(sample, ids=ids, spans=spans, prompt_length=prompt), cut
