"""A point between the base and the tuned model of a published run, as a model of its own.

    run spec + remedy (``point_spec``) ──► result, prepared data, checkpoint of the run
        ──► ``point_scan`` ──► choice ──► test of the point ──► ``publication`` ──► <run>-point-0.6

What ``evaluation.remedy`` does within a run, afterwards and by one process. What the base model did
with the test sets is the run's; with the reported halves of the retention sets it is measured
again. The model is measured in float32, which is what is written.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from finetune_api.evaluation_results import BASE, TUNED, Row
from finetune_api.remedy import RemedyResult
from finetune_api.run_spec import RunSpec
from finetune_trainer.engine.base import fetch_base
from finetune_trainer.engine.checkpointing.dcp import load_weights
from finetune_trainer.engine.checkpointing.dcp_storage import CheckpointReader
from finetune_trainer.engine.memory.profiling import packing_of
from finetune_trainer.engine.model import CPU, build_base, load_tokenizer
from finetune_trainer.engine.task_losses import TASKS
from finetune_trainer.engine.tuning.interpolation import Line, line_of, own_weights
from finetune_trainer.engine.world import World, join
from finetune_trainer.evaluate.answering import answer_questions, answer_sets, scores_of_sets
from finetune_trainer.evaluate.evaluators import evaluator_of
from finetune_trainer.evaluate.measure import Evaluator
from finetune_trainer.evaluate.point_scan import scan
from finetune_trainer.evaluate.remedy_check import check_remedy
from finetune_trainer.failures import UserError
from finetune_trainer.prepared.dataset import PreparedData
from finetune_trainer.prepared.halves import Halves, retention_halves
from finetune_trainer.prepared.questions import read_questions
from finetune_trainer.publish.export import Loaded, checkpoint_reader, initial_model
from finetune_trainer.publish.predictions import in_use
from finetune_trainer.publish.publication import Written, judge, open_prepared, upload, write
from finetune_trainer.storage import runfiles
from finetune_trainer.storage.current import CurrentPointer
from finetune_trainer.storage.objects import ObjectNotFound, ObjectStore, Stores
from finetune_trainer.storage.published import read_published
from finetune_trainer.storage.run_head import read_head
from finetune_trainer.storage.runfiles import RowAnswers, RunResult, SetAnswers

_NAMES: Final[dict[str, str]] = {"Interpolation": "point", "LayerLinear": "layer-linear"}
"""What a scan adds to the name of a run."""


@dataclass(frozen=True)
class PublishedPoint:
    """What was found between the base and the tuned model."""

    remedy: RemedyResult
    uri: str | None = None
    """Address of the chosen model; None: no point qualifies, or it is the tuned model as it is."""
    held: str | None = None
    """Which gates the chosen model misses; without one, those that the run has missed."""


def publish_point(run_spec: RunSpec, stores: Stores, scratch: Path) -> PublishedPoint:
    """Choose a point between the base and the tuned model of a run, and publish the model there
    beside the run's. CURRENT.json and latest.json stay.

    Args:
        run_spec: as ``point_spec`` reads it, with the storage in use.
        scratch: folder for temporary files, with space for the base model and the output.

    Raises:
        UserError: 'NotTrained', 'DataGone', 'CheckpointGone', with what is gone; 'BaseChanged';
            'RemedyNotMeasured'; 'UnsuitableModel'.
        CorruptCheckpoint, ArtefactDiffers, StorageDenied, StorageUnavailable.
    """
    source = _open(run_spec, stores, scratch)
    spec, store = run_spec.spec, stores.default
    world = join(
        spec.model_copy(update={"training": spec.training.model_copy(update={"precision": "FP32"})})
    )
    chosen = _choose(source, world, stores, scratch)
    if isinstance(chosen, RemedyResult):
        published = read_published(store, run_spec.output_uri)
        return PublishedPoint(chosen, held=published[0].held if published else None)
    uploaded = upload(chosen.run_spec, stores, chosen.result, source.data, chosen.written, scratch)
    model = None
    if spec.output.current is not None:
        model = CurrentPointer(store, spec.output.destination).read().file.current
    used = in_use(store, model, spec.output.destination, uploaded.sets) if model else None
    manifest, _ = judge(uploaded, store, used, scratch, of=run_spec.run)
    assert chosen.result.remedy is not None, "measured at a point"
    return PublishedPoint(chosen.result.remedy, chosen.run_spec.output_uri, manifest.held)


@dataclass(frozen=True)
class _Source:
    """The run whose tuned model is moved."""

    run_spec: RunSpec
    result: RunResult
    data: PreparedData
    halves: Halves
    checkpoint: CheckpointReader
    base_row: RowAnswers


@dataclass(frozen=True)
class _Chosen:
    """The model at the chosen point, tested and written to files."""

    run_spec: RunSpec
    result: RunResult
    written: Written


def _open(run_spec: RunSpec, stores: Stores, scratch: Path) -> _Source:
    """Find all that the run has left."""
    store, uri = stores.default, run_spec.run_uri
    try:
        result = runfiles.read_result(store, uri)
        prepared = runfiles.read_prepared(store, uri)
        base_row = runfiles.read_row(store, uri, BASE)
    except ObjectNotFound as error:
        raise UserError(
            "NotTrained",
            f"{error.uri} does not exist: the working files of run {run_spec.run} below"
            f" {run_spec.spec.effective_workspace}, which a point is made from, were removed; run"
            " the job again (spec.rerunToken), with evaluation.remedy",
        ) from None
    data = open_prepared(store, prepared.uri, scratch)
    check_remedy(run_spec.spec, data)
    halves = retention_halves(data, run_spec.spec)
    assert halves is not None, "the spec has a remedy"
    checkpoint = checkpoint_reader(store, uri, _tuned_checkpoint(store, uri, result))
    return _Source(run_spec, result, data, halves, checkpoint, base_row)


def _tuned_checkpoint(store: ObjectStore, run_uri: str, result: RunResult) -> str | None:
    """Address of the tuned model's checkpoint, where the run itself has published a point."""
    found, uri = read_head(store, run_uri), result.summary.checkpoint
    point = found[0].point if found else None
    return point.source if point is not None and point.uri == uri else uri


class _Moved:
    """The model of the run, which is moved between its base and itself. It is the base model at
    first."""

    def __init__(self, source: _Source, world: World, stores: Stores, scratch: Path) -> None:
        spec = source.run_spec.spec
        assert spec.evaluation.remedy is not None, "see point_spec"
        self._scan, self._checkpoint = spec.evaluation.remedy.scan, source.checkpoint
        self._base = fetch_base(source.run_spec, stores, scratch, weights=True)
        if list(self._base.base.lineage) != source.result.lineage:
            raise UserError(
                "BaseChanged",
                f"{source.run_spec.base_model.source} is not the model that run"
                f" {source.run_spec.run} began with; publish that one there again",
            )
        folder = self._base.folder
        packing = packing_of(build_base(folder, init="Meta"), spec)
        self._model = initial_model(folder, self._base.weights(stores), spec)
        torch.nn.Module.to(self._model, world.device)
        self._own = own_weights(self._model, lambda: None)  # still those of the base
        self._tokenizer = load_tokenizer(folder)
        loss = TASKS[spec.task].loss(self._model, spec.training, None)
        self.evaluator = evaluator_of(spec, world, source.data, loss, packing, self._tokenizer)

    def tuned(self) -> Line:
        """Make it the tuned model, and return the line from there."""
        load_weights(self._checkpoint, self._model)
        return line_of(self._model, self._scan, self._own)

    def loaded(self) -> Loaded:
        """Return the model where it is now, on the CPU."""
        torch.nn.Module.to(self._model, CPU)
        return Loaded(self._model.eval(), self._tokenizer, self._base)


def _choose(source: _Source, world: World, stores: Stores, scratch: Path) -> _Chosen | RemedyResult:
    """Scan the points, and test and write the model at the chosen one; without a point that is not
    the tuned model's, return what was measured."""
    spec, store, halves = source.run_spec.spec, stores.default, source.halves
    moved = _Moved(source, world, stores, scratch)
    found = scan(moved.evaluator, moved.tuned(), spec.evaluation, halves)
    if found.chosen is None or found.chosen == 1:
        return found
    base = _base_row(source, moved.evaluator)
    moved.tuned().move(found.chosen)  # the scan came to each point by many roundings
    name = f"{source.run_spec.run}-{_NAMES[found.scan]}-{found.chosen:g}"
    run_spec = source.run_spec.model_copy(update={"run": name})
    result = _test(source, run_spec, moved.evaluator, found, base, store)
    compares = spec.evaluation.artefact_check != "Off"
    written = write(run_spec, store, result, source.data, moved.loaded(), scratch, compares)
    return _Chosen(run_spec, result, written)


def _base_row(source: _Source, evaluator: Evaluator) -> RowAnswers:
    """Return what the base model does with the prompts as they are: with the test sets as the run
    has measured it, with the reported halves of the retention sets as it is measured now.

    Args:
        evaluator: its model is the base model.
    """
    known, began = source.base_row, time.monotonic()
    retention = answer_sets(evaluator, source.run_spec.spec, source.halves, ("retention",))
    measured = {found.name: found for found in retention}
    sets = [measured.get(found.name, found) for found in known.sets]
    seconds = known.process_seconds + time.monotonic() - began
    return known.model_copy(update={"sets": sets, "process_seconds": round(seconds, 3)})


def _test(
    source: _Source,
    run_spec: RunSpec,
    evaluator: Evaluator,
    remedy: RemedyResult,
    base: RowAnswers,
    store: ObjectStore,
) -> RunResult:
    """Answer the test prompts by the model at the point, and write the working files that publish
    reads; return the result.

    Args:
        run_spec: of the point.
        base: what the base model does with the prompts as they are.
    """
    spec, old, new = source.run_spec.spec, source.run_spec.run_uri, run_spec.run_uri
    began = time.monotonic()
    tuned = _timed(TUNED, answer_sets(evaluator, spec, source.halves), began)
    rows = [base, *_other_base_rows(store, old, source.result), tuned]
    for prompting, questions in read_questions(store, old).items():
        if prompting.tuned:
            row = Row(model="Tuned", prompt=prompting.prompt, draw=prompting.draw)
            began = time.monotonic()
            rows.append(_timed(row, answer_questions(evaluator, spec, questions), began))
    result = source.result.model_copy(
        update={
            "rows": [row.row for row in rows],
            "remedy": remedy,
            "memorisation": None,  # of the tuned model; here it was not measured
            "data_curve": [],
            "summary": source.result.summary.model_copy(
                update={"scores": list(scores_of_sets(base, tuned))}
            ),
        }
    )
    runfiles.write_prepared(store, new, runfiles.read_prepared(store, old))
    for answers in rows:
        runfiles.write_row(store, new, answers)
    runfiles.write_result(store, new, result)
    return result


def _other_base_rows(store: ObjectStore, run_uri: str, result: RunResult) -> list[RowAnswers]:
    rows = [row for row in result.rows if row.model == "Base" and row != BASE]
    return [runfiles.read_row(store, run_uri, row) for row in rows]


def _timed(row: Row, sets: list[SetAnswers], began: float) -> RowAnswers:
    return RowAnswers(row=row, sets=sets, process_seconds=round(time.monotonic() - began, 3))
