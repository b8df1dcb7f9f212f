"""What happens to a sample of more tokens than ``training.maxLength``: a pure function. Documents
that are split (``documents``) have been before."""

from __future__ import annotations

from typing import Final, get_args

from finetune_trainer.failures import DataError
from finetune_trainer.prepare.tokenizing.tokens import Cut, Sample

CUTS: Final[tuple[Cut, ...]] = get_args(Cut)


def fit(sample: Sample, limit: int, policy: str, bos: int | None) -> tuple[Sample | None, Cut]:
    """The sample in at most ``limit`` tokens (None: left out), and what that took.

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
            " record, raise training.maxLength, or set data.quality.overlength to Split, Truncate"
            " or Drop",
        )
    if policy == "Drop":
        return None, "Dropped"
    return sample.shortened(limit, bos)
