"""Leaves out what the training set holds twice, exactly or nearly."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from finetune_api.sources import Quality
from finetune_trainer.failures import DataError
from finetune_trainer.prepare.gathering.report import SourceReport
from finetune_trainer.prepare.mapping.facts import Facts, PartSummary
from finetune_trainer.prepare.quality.duplicates import Seen
from finetune_trainer.prepare.quality.nearduplicates import SeenAlike

Rows = npt.NDArray[np.int64]


class Deduplicator:
    """The samples of all training sources that came before."""

    def __init__(self, quality: Quality) -> None:
        self._most = quality.max_duplicate_fraction
        self._exact = Seen() if quality.deduplicate else None
        drop_near = quality.near_duplicates == "Drop"
        self._near = SeenAlike(float(quality.near_duplicate_similarity)) if drop_near else None
        self._last = ("", False)
        self._drafts = 0
        self._dropped = 0

    def begin_part(self, part: PartSummary) -> None:
        """Count what the part's worker saw, and left out, already."""
        self._last = ("", False)
        self._drafts += part.training_drafts
        self._dropped += part.duplicates

    def fresh(self, facts: Facts, report: SourceReport) -> Rows:
        """The rows that did not occur before; the others are counted in the report."""
        kept = np.arange(len(facts))
        if self._exact is not None:
            known = np.array(self._exact.add(facts.digests()), np.bool_)
            report.duplicates += int(known.sum())
            kept = kept[~known]
        if self._near is not None:
            alike = self._alike(self._near, facts, kept)
            report.near_duplicates += int(alike.sum())
            kept = kept[~alike]
        self._dropped += len(facts) - len(kept)
        return kept

    def _alike(self, near: SeenAlike, facts: Facts, rows: Rows) -> npt.NDArray[np.bool_]:
        """True at those of some rows whose record is like an earlier one. The samples of one record
        follow one another and share its words, so they are judged by the first of them, which
        earlier rows may hold."""
        places = [self._last[0], *facts.texts("where", rows)]
        begins = np.array([place != before for before, place in pairwise(places)], np.bool_)
        verdicts = [self._last[1], *near.add(facts.fingerprints()[rows[begins]])]
        self._last = (places[-1], verdicts[-1])
        return np.array(verdicts, np.bool_)[np.cumsum(begins)]

    def check(self) -> None:
        """Whether the training set is what it seems.

        Raises:
            DataError: 'TooManyDuplicates' where more than ``data.quality.maxDuplicateFraction``
                of it was left out.
        """
        if self._most is not None and self._dropped > float(self._most) * self._drafts:
            raise DataError(
                "TooManyDuplicates",
                f"{self._dropped} of {self._drafts} training samples"
                f" ({self._dropped / self._drafts:.1%}) are duplicates of others, more than"
                f" data.quality.maxDuplicateFraction {self._most}; correct the data, or raise it",
            )
