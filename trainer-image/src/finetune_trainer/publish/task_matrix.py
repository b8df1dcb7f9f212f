"""The matrix of a sequence of runs (after run i × set j), each of which started from the model of
the run before: what was forgotten on the way, and what later runs gave to earlier tasks.

    lineage ──► predictions.jsonl of each model before ──┐
    this run: its tuned model, and its base (the last of them) ──┴─(equal samples)──► TaskMatrix

Nothing is measured for it: values are those of the answers that each run has published. A model
counts for a set if it has answered at least half of its samples.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from finetune_api.evaluation_results import (
    BASE,
    TUNED,
    Comparison,
    MatrixColumn,
    TaskMatrix,
)
from finetune_api.results import Ancestor
from finetune_api.tasks import Kinds, MetricKind
from finetune_trainer.evaluate.recommendation import primary_of
from finetune_trainer.failures import StorageUnavailable, UserError
from finetune_trainer.publish.measured_sets import MeasuredSet
from finetune_trainer.publish.model_comparison import ComparedSet, Model, compare_on
from finetune_trainer.publish.predictions import Prediction, by_sample, predictions_of
from finetune_trainer.publish.published_results import read_all_predictions, read_results
from finetune_trainer.storage.objects import ObjectStore

MOST_BEFORE: Final = 8
"""Models before the run's own that are read: the newest."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """A model of the sequence."""

    model: Model
    tests: frozenset[str]
    """Names of its test sets, without retention sets."""
    tuned: bool = True
    """False: the base of the first run."""


def matrix_of(
    store: ObjectStore,
    lineage: Sequence[Ancestor],
    sets: Sequence[MeasuredSet],
    name: str,
    kinds: Kinds,
    redact: bool,
) -> TaskMatrix | None:
    """Return the matrix of a run; None: no model before it was measured on one of its sets, except
    as its base.

    Args:
        store: with the models of the lineage.
        lineage: models that the run started from, oldest first.
        sets: of the run.
        name: of the run's model.
        kinds: all metrics of the run.
        redact: see ``predictions_of``.
    """
    tuned = [ancestor for ancestor in lineage if ancestor.run is not None][-MOST_BEFORE:]
    if not tuned:
        return None
    stages, not_read = list[Stage](), dict[str, str]()
    for ancestor in tuned:
        try:
            stages += _stages(store, ancestor, first=not stages)
        except (UserError, StorageUnavailable) as error:
            log.warning("the results of %s are not in the matrix: %s", ancestor.uri, error)
            stages.append(Stage(Model(_name(ancestor), {}, {}), frozenset()))
            not_read[_name(ancestor)] = error.message
    lines = [line for each in sets for line in predictions_of(each, redact)]
    metrics = {each.name: [str(m) for m in each.metrics] for each in sets}
    base = Model(stages[-1].model.name, _known(_with_losses_of_base(lines, sets)), metrics, kinds)
    own = frozenset(each.name for each in sets if not each.retention)
    return matrix(
        [
            *stages[:-1],
            replace(stages[-1], model=_joined(stages[-1].model, base)),
            Stage(Model(name, _known(lines), metrics, kinds), own),
        ],
        not_read,
    )


def _name(ancestor: Ancestor) -> str:
    return f"{ancestor.job} {ancestor.run}"


def _stages(store: ObjectStore, ancestor: Ancestor, *, first: bool) -> list[Stage]:
    """A model by what it was published with; the first one behind its base.

    Raises:
        UserError: 'ModelNotFound', 'PublishedFileGone'.
    """
    results = read_results(store, ancestor.uri)
    lines = read_all_predictions(store, results)
    metrics = {found.name: list(found.tuned) for found in results.scores}
    tests = frozenset(table.name for table in results.evaluation.sets if not table.retention)
    found = [Stage(Model(_name(ancestor), _known(lines), metrics, results.kinds), tests)]
    base = _known(map(_of_base, lines))
    if first and base:
        found.insert(
            0, Stage(Model("Base", base, metrics, results.kinds), frozenset(), tuned=False)
        )
    return found


def matrix(stages: Sequence[Stage], not_read: Mapping[str, str]) -> TaskMatrix | None:
    """Return the matrix; None: no set of the last model is known to another one than the last
    but one, or was a test set before.

    Args:
        stages: oldest first.
        not_read: see ``TaskMatrix``.
    """
    names = dict.fromkeys(name for name, _ in stages[-1].model.predictions)
    found = [column for name in names if (column := _column(name, stages)) is not None]
    columns = [column for column, _ in found]
    if not any(_tells(column) for column in columns):
        return None
    shares = [(column, kind) for column, kind in found if kind.percent]
    return TaskMatrix(
        models=[stage.model.name for stage in stages],
        columns=columns,
        average_forgetting=_mean(column.forgetting for column, _ in shares),
        backward_transfer=_mean(_gain(column.transfer, kind) for column, kind in shares),
        not_read=dict(not_read),
    )


def _tells(column: MatrixColumn) -> bool:
    """Whether a column has more than the base and the tuned model of the last run."""
    was_task = column.own is not None and column.own < len(column.values) - 1
    return was_task or any(value is not None for value in column.values[:-2])


def _column(name: str, stages: Sequence[Stage]) -> tuple[MatrixColumn, MetricKind] | None:
    last = len(stages) - 1
    ours = {sample for sample in stages[-1].model.predictions if sample[0] == name}
    having = [
        number
        for number, stage in enumerate(stages)
        if 2 * len(ours & stage.model.predictions.keys()) >= len(ours)
    ]
    if len(having) < 2:
        return None
    found = compare_on(name, [_only(stages[n].model, name) for n in having], min_points=1.0)
    metric = primary_of(found.metrics)
    if metric is None:
        return None
    values = dict(zip(having, _values(found, metric), strict=True))
    own = next((n for n, stage in enumerate(stages) if name in stage.tests), None)
    kind = found.metrics[metric]
    sign = 1 if kind.higher_is_better else -1
    tuned_before = [
        sign * value for n in having[:-1] if stages[n].tuned and (value := values[n]) is not None
    ]
    final = values[last]
    transfer = None
    if own in having and own is not None and own < last:
        pair = [_only(stages[n].model, name) for n in (own, last)]
        transfer = compare_on(name, pair, min_points=1.0).models[1].comparisons.get(metric)
    column = MatrixColumn(
        data_set=name,
        metric=metric,
        samples=found.samples,
        values=[values.get(n) for n in range(len(stages))],
        own=own,
        forgetting=max(tuned_before) - sign * final if tuned_before and final is not None else None,
        transfer=transfer,
    )
    return column, kind


def _values(found: ComparedSet, metric: str) -> list[float | None]:
    known = [model.estimates.get(metric) for model in found.models]
    return [each.value if each else None for each in known]


def _gain(found: Comparison | None, kind: MetricKind) -> float | None:
    """The effect of a comparison; positive: better."""
    if found is None:
        return None
    return found.effect if kind.higher_is_better else -found.effect


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _only(model: Model, name: str) -> Model:
    of_set = {sample: line for sample, line in model.predictions.items() if sample[0] == name}
    return Model(model.name, of_set, model.metrics, model.kinds)


def _joined(published: Model, measured: Model) -> Model:
    """A model by what it was published with, and by what the run has measured of it as its base."""
    return Model(
        published.name,
        {**published.predictions, **measured.predictions},
        {**published.metrics, **measured.metrics},
        published.kinds,
    )


def _known(lines: Iterable[Prediction]) -> dict[tuple[str, str], Prediction]:
    """The lines with an answer or a loss of the tuned model, by set and sample."""
    return by_sample(x for x in lines if TUNED.name in x.answers or x.loss is not None)


def _of_base(line: Prediction) -> Prediction:
    """What the base model answered, as the answer of a model of its own. Its loss is not known."""
    found: dict[str, Any] = {"loss": None, "labels": 0, "answers": {}}
    for by_row in ("answers", "log_likelihoods", "chosen_labels", "scores"):
        known = getattr(line, by_row)
        if known and BASE.name in known:
            found[by_row] = {TUNED.name: known[BASE.name]}
    return line.model_copy(update=found)


def _with_losses_of_base(
    lines: Iterable[Prediction], sets: Sequence[MeasuredSet]
) -> Iterator[Prediction]:
    """What the base of this run answered, as ``_of_base``, with its losses."""
    losses = {
        (each.name, digest): {"loss": loss, "labels": int(labels)}
        for each in sets
        for row in each.answered
        if row.row == BASE
        for digest, loss, labels in zip(each.digests, row.losses, row.labels, strict=False)
    }
    for line in lines:
        yield _of_base(line).model_copy(update=losses.get((line.data_set, line.sample), {}))
