"""The table of results of one test set: rows (a model, and how the test prompts are put to it),
their metrics with intervals, and the tuned model against each row.

    answers of each row ──(same samples)──► Outcome ──► Estimate of each metric
                                                 └────► Comparison with the tuned model

Pure. Samples of one group of the data (``data.split.groupBy``), and the answers of several draws of
examples to one sample, are not independent: they are one group of the statistics.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, product
from typing import Final

import numpy as np
import numpy.typing as npt

from finetune_api.evaluation_results import Comparison, Estimate, Metrics, Row, SetTable, TableRow
from finetune_api.tasks import Kinds
from finetune_trainer.evaluate.comparisons import Outcome, compare_outcomes, score_of
from finetune_trainer.evaluate.paired import estimate, holm
from finetune_trainer.evaluate.scores import Scores, answers_to
from finetune_trainer.evaluate.weighted_scores import Groups, value_of
from finetune_trainer.prepared.dataset import Reference
from finetune_trainer.storage.runfiles import LabelScores

Floats = npt.NDArray[np.float64]
_NONE: Final = np.zeros(0)


@dataclass(frozen=True)
class Answered:
    """Answers of one row to one test set, of one draw."""

    row: Row
    """Which row and draw."""
    samples: Sequence[int]
    """Numbers of the answered samples in the set, ascending."""
    answers: Sequence[str]
    """Answer to each."""
    tokens: Sequence[int] = ()
    """Generated tokens of each."""
    losses: Floats = field(default_factory=lambda: _NONE)
    """Loss of each sample of the set, summed over its labels, shape [samples]; or empty."""
    labels: Floats = field(default_factory=lambda: _NONE)
    """Number of labels of each sample of the set; 0 where the loss is not known."""
    metrics: Metrics = field(default_factory=dict)
    """Metrics that are known already."""
    label_scores: LabelScores | None = None
    """Log-likelihoods of the labels after the prompts of ``samples``; None: not measured."""
    scores: Scores = field(default_factory=dict)
    """Scores of ``samples`` from outside of the trainer, by metric."""
    process_seconds: float = 0.0
    measured_by: str | None = None
    """Job and run that have measured it; None: this one."""

    def of(self, samples: Sequence[int]) -> Answered:
        """The answers to some of the answered samples, in this order, without their tokens."""
        at = {sample: row for row, sample in enumerate(self.samples)}
        rows = [at[sample] for sample in samples]
        return replace(
            self,
            samples=samples,
            answers=[self.answers[row] for row in rows],
            tokens=(),
            label_scores=self.label_scores and self.label_scores.at(rows),
            scores={m: [scores[row] for row in rows] for m, scores in self.scores.items()},
        )


@dataclass(frozen=True)
class RowOutcome:
    """All draws of a row, as one outcome."""

    draws: Sequence[Answered]
    references: Sequence[Reference]
    """References of the first samples of the set, as many as any row has answered."""
    groups: Groups
    """Number of the group of each sample of the set, shape [samples]."""

    @property
    def row(self) -> Row:
        """The row, of its first draw."""
        return self.draws[0].row

    @property
    def samples(self) -> Sequence[int]:
        """Numbers of the answered samples; equal for all draws."""
        return self.draws[0].samples

    @property
    def measured(self) -> int:
        """Number of answered samples; without answers, of samples with a loss."""
        return len(self.samples) or int(self.losses_known.sum())

    @property
    def measured_groups(self) -> int | None:
        """Number of the groups of these samples; None: each sample is one."""
        measured = list(self.samples) or np.flatnonzero(self.losses_known)
        count = len(np.unique(self.groups[measured]))
        return count if count < self.measured else None

    @property
    def losses_known(self) -> npt.NDArray[np.bool_]:
        """Samples whose loss is known, shape [samples of the set], or [0] of a row without."""
        found: npt.NDArray[np.bool_] = self.draws[0].labels > 0
        return found if len(self.draws) == 1 else found[:0]

    def outcome(
        self, samples: Sequence[int], with_loss: npt.NDArray[np.bool_] | None = None
    ) -> Outcome:
        """What the row did with some samples that it answered.

        Args:
            with_loss: samples whose loss counts, shape [samples of the set]; None: all known.
        """
        parts = [draw.of(samples) for draw in self.draws]
        said = [answer for part in parts for answer in part.answers]
        asked = [self.references[n] for n in samples] * len(self.draws)
        counted = self.losses_known if with_loss is None else with_loss
        first = self.draws[0]
        return Outcome(
            first.losses[: len(counted)][counted],
            first.labels[: len(counted)][counted],
            answers_to(
                asked,
                said,
                joined([part.label_scores for part in parts]),
                {m: [s for part in parts for s in part.scores[m]] for m in first.scores},
            ),
            loss_groups=self.groups[: len(counted)][counted],
            answer_groups=np.tile(self.groups[list(samples)], len(self.draws)),
        )

    def of(self, draws: Sequence[Answered]) -> RowOutcome:
        """Other draws over the same set."""
        return RowOutcome(draws, self.references, self.groups)


def rows_of(
    answered: Iterable[Answered], references: Sequence[Reference], groups: Groups
) -> list[RowOutcome]:
    """Collect answers by row; draws of a row follow each other.

    Args:
        references, groups: see ``RowOutcome``.
    """
    return [
        RowOutcome(list(draws), references, groups)
        for _, draws in groupby(answered, lambda a: a.row.name)
    ]


def table_of(
    name: str,
    rows: Sequence[RowOutcome],
    judged: Row,
    metrics: Kinds,
    min_points: float,
) -> SetTable:
    """Return the table of a test set.

    Args:
        name: of the set.
        rows: in the order of the table.
        judged: row that is compared with the others (``SetTable.judged``).
        metrics: of the table.
        min_points: see ``compare_outcomes``.
    """
    against = next(row for row in rows if row.row == judged)
    return SetTable(name=name, rows=[_row(row, against, metrics, min_points) for row in rows])


def _row(row: RowOutcome, against: RowOutcome, metrics: Kinds, min_points: float) -> TableRow:
    tokens = [count for draw in row.draws for count in draw.tokens]
    return TableRow(
        row=row.row.name,
        model=row.row.model,
        prompt=row.row.prompt,
        samples=row.measured,
        groups=row.measured_groups,
        draws=len(row.draws),
        metrics=estimates(row, metrics),
        comparisons=({} if row is against else compare_rows(row, against, metrics, min_points)),
        tokens_per_answer=sum(tokens) / len(tokens) if tokens and any(tokens) else None,
        process_seconds=sum(draw.process_seconds for draw in row.draws),
        measured_by=", ".join(sorted({draw.measured_by for draw in row.draws if draw.measured_by}))
        or None,
    )


def compare_rows(
    old: RowOutcome, new: RowOutcome, metrics: Kinds, min_points: float
) -> dict[str, Comparison]:
    """Compare two rows over the samples that both have answered. Each draw of one is compared with
    each draw of the other."""
    both = sorted(set(old.samples) & set(new.samples))
    pairs = list(product(old.draws, new.draws))
    before, after = (row.of([pair[i] for pair in pairs]) for i, row in enumerate((old, new)))
    known = before.losses_known, after.losses_known
    losses = known[0] & known[1] if len(known[0]) == len(known[1]) else known[0][:0]
    return compare_outcomes(
        before.outcome(both, losses), after.outcome(both, losses), metrics, min_points
    )


def estimates(row: RowOutcome, metrics: Kinds) -> dict[str, Estimate]:
    """Return the metrics of a row with their intervals, by name."""
    found = {}
    outcome = row.outcome(row.samples)
    for metric, kind in metrics.items():
        score = score_of(metric, outcome)
        known = estimate(score, outcome.groups_of(metric), kind.span) if score else None
        if known is not None:
            value, low, high = known
            spread = _spread(row, metric)
            found[metric] = Estimate(value=value, low=low, high=high, **spread)
        elif len(row.draws) == 1 and metric in row.draws[0].metrics:
            found[metric] = Estimate(value=row.draws[0].metrics[metric])
    return found


def _spread(row: RowOutcome, metric: str) -> dict[str, float]:
    if len(row.draws) == 1:
        return {}
    values = []
    for draw in row.draws:
        score = score_of(metric, row.of([draw]).outcome(draw.samples))
        if score is not None:
            values.append(value_of(score))
    return {"lowest": min(values), "highest": max(values)} if values else {}


def joined(parts: Sequence[LabelScores | None]) -> LabelScores | None:
    """Log-likelihoods of the samples of several parts, one after another; None: a part has none, or
    of other labels."""
    first, *others = parts
    if first is None:
        return None
    values = list(first.values)
    for part in others:
        if part is None or (part.labels, part.tokens) != (first.labels, first.tokens):
            return None
        values += part.values
    return first.model_copy(update={"values": values})


def adjusted(tables: Sequence[SetTable]) -> list[SetTable]:
    """Return the tables with the adjusted p of all their comparisons together (Holm)."""
    ps = [c.p for table in tables for c in _comparisons(table)]
    after = iter(holm(ps))

    def with_p(found: Comparison) -> Comparison:
        return found.model_copy(update={"p_adjusted": next(after)})

    def with_ps(table: SetTable) -> SetTable:
        rows = [
            row.model_copy(
                update={"comparisons": {m: with_p(c) for m, c in row.comparisons.items()}}
            )
            for row in table.rows
        ]
        slices = [
            part.model_copy(update={"comparison": with_p(part.comparison)})
            if part.comparison
            else part
            for part in table.slices
        ]
        return table.model_copy(update={"rows": rows, "slices": slices})

    return [with_ps(table) for table in tables]


def _comparisons(table: SetTable) -> list[Comparison]:
    """All comparisons of a table, in the order of ``adjusted``."""
    of_rows = [c for row in table.rows for c in row.comparisons.values()]
    return of_rows + [part.comparison for part in table.slices if part.comparison]
