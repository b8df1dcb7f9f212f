"""Drops exact and near duplicates of the training set."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from finetune_api.sources import Quality
from finetune_trainer.failures import DataError
from finetune_trainer.prepare.mapping.statistics import SampleStatistics, SplitSummary
from finetune_trainer.prepare.quality.duplicates import Seen
from finetune_trainer.prepare.quality.nearduplicates import SeenFingerprints
from finetune_trainer.prepare.reducing.report import SourceReport

Rows = npt.NDArray[np.int64]


class Deduplicator:
    """The training samples seen so far, of all sources."""

    def __init__(self, quality: Quality) -> None:
        self._most = quality.max_duplicate_fraction
        self._exact = Seen() if quality.deduplicate else None
        drop_near = quality.near_duplicates == "Drop"
        similarity = float(quality.near_duplicate_similarity)
        self._near = SeenFingerprints(similarity) if drop_near else None
        self._last = ("", False)
        self._examples = 0
        self._dropped = 0

    def begin_split(self, summary: SplitSummary) -> None:
        """Begin an input split."""
        self._last = ("", False)
        self._examples += summary.training_examples

    def fresh(self, statistics: SampleStatistics, report: SourceReport) -> Rows:
        """Return the rows that are no duplicates; count the duplicates in the report."""
        kept = np.arange(len(statistics))
        if self._exact is not None:
            known = np.array(self._exact.add(statistics.digests()), np.bool_)
            report.duplicates += int(known.sum())
            kept = kept[~known]
        if self._near is not None:
            alike = self._alike(self._near, statistics, kept)
            report.near_duplicates += int(alike.sum())
            kept = kept[~alike]
        self._dropped += len(statistics) - len(kept)
        return kept

    def _alike(
        self, near: SeenFingerprints, statistics: SampleStatistics, rows: Rows
    ) -> npt.NDArray[np.bool_]:
        """Whether the record of each row is a near duplicate of an earlier one. The samples of a
        record are consecutive and share its text, so the result of the first one, possibly in an
        earlier batch of rows, applies to all."""
        places = [self._last[0], *statistics.texts("where", rows)]
        begins = np.array([place != before for before, place in pairwise(places)], np.bool_)
        decisions = [self._last[1], *near.add(statistics.fingerprints()[rows[begins]])]
        self._last = (places[-1], decisions[-1])
        return np.array(decisions, np.bool_)[np.cumsum(begins)]

    def check(self) -> None:
        """Check the share of duplicates.

        Raises:
            DataError: 'TooManyDuplicates', more than ``data.quality.maxDuplicateFraction`` of the
                training examples were dropped.
        """
        if self._most is not None and self._dropped > float(self._most) * self._examples:
            raise DataError(
                "TooManyDuplicates",
                f"{self._dropped} of {self._examples} training samples"
                f" ({self._dropped / self._examples:.1%}) are duplicates of others, more than"
                f" data.quality.maxDuplicateFraction {self._most}; correct the data, or raise it",
            )
