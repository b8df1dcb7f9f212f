"""Leaves out what the training set holds twice, exactly or nearly."""

from __future__ import annotations

from itertools import compress

from finetune_api.sources import Quality
from finetune_trainer.failures import DataError
from finetune_trainer.prepare.drafts import Draft
from finetune_trainer.prepare.duplicates import Seen, digest_of
from finetune_trainer.prepare.nearduplicates import SeenAlike
from finetune_trainer.prepare.report import SourceReport


class Deduplicator:
    """The drafts of all training sources that came before."""

    def __init__(self, quality: Quality) -> None:
        self._most = quality.max_duplicate_fraction
        self._exact = Seen() if quality.deduplicate else None
        drop_near = quality.near_duplicates == "Drop"
        self._near = SeenAlike(float(quality.near_duplicate_similarity)) if drop_near else None
        self._drafts = 0
        self._dropped = 0

    def fresh(self, drafts: list[Draft], report: SourceReport) -> list[Draft]:
        """The drafts that did not occur before; the others are counted in the report."""
        count = len(drafts)
        if self._exact is not None:
            known = self._exact.add([digest_of(p.text for p in d.parts) for d in drafts])
            report.duplicates += sum(known)
            drafts = list(compress(drafts, (not old for old in known)))
        if self._near is not None:
            known = self._near.add([" ".join(p.text for p in d.parts) for d in drafts])
            report.near_duplicates += sum(known)
            drafts = list(compress(drafts, (not old for old in known)))
        self._drafts += count
        self._dropped += count - len(drafts)
        return drafts

    def check(self) -> None:
        """Whether the training set is what it seems.

        Raises:
            DataError: 'TooManyDuplicates' where more than ``data.quality.maxDuplicateFraction``
                of it was left out.
        """
        if self._most is not None and self._dropped > float(self._most) * self._drafts:
            raise DataError(
                "TooManyDuplicates",
                f"{self._dropped} of {self._drafts} training records"
                f" ({self._dropped / self._drafts:.1%}) are duplicates of others, more than"
                f" data.quality.maxDuplicateFraction {self._most}; correct the data, or raise it",
            )
