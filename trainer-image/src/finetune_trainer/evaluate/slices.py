"""Test metrics by value of a field of the records (``evaluation.slices``): a slice of a test set is
compared like a set of its own, so that a loss in a rare case is seen behind a gain in the mean.

Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from finetune_api.evaluation_results import BASE, TUNED, Slice
from finetune_api.tasks import Kinds
from finetune_trainer.evaluate.recommendation import primary_of
from finetune_trainer.evaluate.table import Answered, RowOutcome, compare_rows, estimates
from finetune_trainer.failures import UserError
from finetune_trainer.prepared.slices import NONE


def check_slices(fields: Sequence[str], values: Mapping[str, Sequence[str]]) -> None:
    """Refuse a field that no test record has.

    Args:
        fields: ``evaluation.slices``.
        values: of all test samples, by field.

    Raises:
        UserError: 'SliceFieldMissing', naming the field.
    """
    for number, field in enumerate(fields):
        if any(value != NONE for value in values[field]):
            continue
        why = (
            f"no test record has a value of {field!r}" if values[field] else "there is no test set"
        )
        raise UserError(
            "SliceFieldMissing",
            f"spec.evaluation.slices[{number}]: {field}: {why}; name a field of the records in"
            " data.test (without data.test: of those in data.train, with data.split.test above 0),"
            " or take it out of the list",
        )


def slices_of(
    rows: Sequence[RowOutcome],
    values: Mapping[str, Sequence[str]],
    metrics: Kinds,
    min_points: float,
) -> list[Slice]:
    """Return the slices of a test set, the worst change of the primary metric first; where nothing
    was trained, by field and value.

    Args:
        rows: of the set.
        values: of the samples of the set, by field.
        metrics: of the set.
        min_points: see ``compare_outcomes``.
    """
    base, tuned = (next((row for row in rows if row.row == of), None) for of in (BASE, TUNED))
    if base is None:
        return []
    metric = primary_of(metrics)
    main = {metric: metrics[metric]} if metric else {}
    found = []
    for field, texts in values.items():
        members: dict[str, list[int]] = {}
        for number, text in enumerate(texts):
            members.setdefault(text, []).append(number)
        for value in sorted(members):
            before = part_of(base, members[value])
            after = part_of(tuned, members[value]) if tuned else None
            measured = after or before
            if not measured.measured:
                continue
            compared = compare_rows(before, after, main, min_points) if after else {}
            made = Slice(
                field=field,
                value=value,
                samples=measured.measured,
                groups=measured.measured_groups,
                base=estimates(before, metrics),
                tuned=estimates(after, metrics) if after else {},
                metric=metric,
                comparison=compared.get(metric) if metric else None,
            )
            found.append(made)
    sign = 1 if metric is None or metrics[metric].higher_is_better else -1
    return sorted(
        found, key=lambda part: sign * part.comparison.effect if part.comparison else math.inf
    )


def part_of(row: RowOutcome, members: Sequence[int]) -> RowOutcome:
    """Return what a row did with some samples of the set, which are a set of their own.

    Args:
        members: numbers of these samples, ascending.
    """
    numbers = {member: number for number, member in enumerate(members)}
    references = [row.references[m] for m in members if m < len(row.references)]

    def part(draw: Answered) -> Answered:
        there = [sample for sample in draw.samples if sample in numbers]
        return replace(
            draw.of(there),
            samples=[numbers[sample] for sample in there],
            losses=draw.losses[list(members)] if len(draw.losses) else draw.losses,
            labels=draw.labels[list(members)] if len(draw.labels) else draw.labels,
            metrics={},
        )

    return RowOutcome([part(d) for d in row.draws], references, row.groups[list(members)])
