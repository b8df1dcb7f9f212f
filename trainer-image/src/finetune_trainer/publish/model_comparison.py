"""Published models against each other, on the samples that all of them have answered.

predictions.jsonl of each ──(equal samples)──► RowOutcome of each ──► Comparison with the first
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from finetune_api.evaluation_results import TUNED, Comparison, Estimate
from finetune_api.tasks import METRICS, Kinds
from finetune_trainer.evaluate.table import Answered, RowOutcome, compare_rows, estimates
from finetune_trainer.evaluate.weighted_scores import Groups
from finetune_trainer.prepared.dataset import Reference
from finetune_trainer.publish.predictions import Prediction, label_scores_of, scores_given
from finetune_trainer.storage.runfiles import LabelScores


@dataclass(frozen=True)
class Model:
    """A published model."""

    name: str
    predictions: Mapping[tuple[str, str], Prediction]
    """By set and sample."""
    metrics: Mapping[str, Sequence[str]]
    """Metrics that it was measured by, for each set."""
    kinds: Kinds = field(default_factory=lambda: METRICS)
    """All metrics of its run."""
    row: str = TUNED.name
    """Name of its row in the predictions."""


@dataclass(frozen=True)
class ComparedModel:
    """A model on one set."""

    name: str
    estimates: Mapping[str, Estimate]
    """Its metrics, over the common samples."""
    comparisons: Mapping[str, Comparison]
    """Against the first model; none for the first."""


@dataclass(frozen=True)
class ComparedSet:
    """A set that all models were measured on."""

    name: str
    samples: int
    """Samples that all models know."""
    of: int
    """Different samples of the first model."""
    groups: int | None
    """Groups of the common samples, where they are fewer."""
    metrics: Kinds
    models: Sequence[ComparedModel]
    """In the order of the command; none where no sample is common."""


def compare_models(models: Sequence[Model], min_points: float) -> list[ComparedSet]:
    """Compare models on the sets that all of them know by name.

    Args:
        models: the first is the one that the others are compared with.
        min_points: smallest gain that matters; see ``compare_outcomes``.
    """
    first, *others = (dict.fromkeys(name for name, _ in model.predictions) for model in models)
    common = [name for name in first if all(name in other for other in others)]
    return [compare_on(name, models, min_points) for name in common]


def compare_on(name: str, models: Sequence[Model], min_points: float) -> ComparedSet:
    """Compare models on the samples of one set that all of them know; arguments as in
    ``compare_models``."""
    ours = [sample for sample in models[0].predictions if sample[0] == name]
    common = [sample for sample in ours if all(sample in m.predictions for m in models)]
    lines = [[m.predictions[sample] for sample in common] for m in models]
    metrics = {
        m: kind
        for m, kind in models[0].kinds.items()
        if all(m in x.metrics.get(name, ()) and x.kinds.get(m) == kind for x in models)
        and not kind.relative
    }
    groups = _groups(lines[0])
    names = [model.row for model in models]
    rows = [_outcome(n, names, lines, groups, metrics) for n in range(len(models))]
    return ComparedSet(
        name=name,
        samples=len(common),
        of=len(ours),
        groups=count if (count := len(np.unique(groups))) < len(common) else None,
        metrics=metrics,
        models=[
            ComparedModel(
                model.name,
                estimates(row, metrics),
                {} if row is rows[0] else compare_rows(rows[0], row, metrics, min_points),
            )
            for model, row in zip(models, rows, strict=True)
            if common
        ],
    )


def _groups(lines: Sequence[Prediction]) -> Groups:
    """Number of the group of each sample; without groups in the file, each is one."""
    return np.array(
        [-1 - at if line.group is None else line.group for at, line in enumerate(lines)], np.int64
    )


def _outcome(
    number: int,
    names: Sequence[str],
    all_lines: Sequence[Sequence[Prediction]],
    groups: Groups,
    metrics: Iterable[str],
) -> RowOutcome:
    """What one model did with the common samples: answers where all models have one, losses where
    all models have one over equally many labels (that of another tokenizer may not be).

    Args:
        number: of the model.
        names: row of each model in its predictions.
    """
    lines = all_lines[number]
    answered = [
        at
        for at, of_sample in enumerate(zip(*all_lines, strict=True))
        if all(name in line.answers for name, line in zip(names, of_sample, strict=True))
    ]
    with_loss = [
        len({line.labels for line in of_sample}) == 1
        and all(line.loss is not None for line in of_sample)
        for of_sample in zip(*all_lines, strict=True)
    ]
    row = Answered(
        row=TUNED,
        samples=answered,
        answers=[lines[at].answers[names[number]] for at in answered],
        label_scores=_label_scores(number, names, all_lines, answered),
        scores=scores_given([lines[at] for at in answered], metrics, names[number]),
        losses=np.array([cast(float, line.loss) if ok else 0.0
                         for line, ok in zip(lines, with_loss, strict=True)], np.float64),
        labels=np.array([line.labels if ok else 0
                         for line, ok in zip(lines, with_loss, strict=True)], np.float64),
    )  # fmt: skip
    return RowOutcome([row], [_reference(line) for line in all_lines[0]], groups)


def _label_scores(
    number: int,
    names: Sequence[str],
    all_lines: Sequence[Sequence[Prediction]],
    at: Sequence[int],
) -> LabelScores | None:
    """Log-likelihoods of the labels in the answered samples, where all models have the same."""
    labels = sorted(all_lines[0][at[0]].label_tokens or ()) if at else []
    known = [
        label_scores_of([these[i] for i in at], labels, name)
        for name, these in zip(names, all_lines, strict=True)
    ]
    return known[number] if all(known) else None


def _reference(line: Prediction) -> Reference:
    return Reference(np.zeros(0, np.int32), line.prompt or "", line.reference or "", line.label)
