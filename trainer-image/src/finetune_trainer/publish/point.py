"""A point between the base and the tuned model of a published run, as a model of its own.

    metrics.json ──► run spec + remedy ──► result, prepared data, checkpoint of the run
        ──► ``point_scan`` ──► choice ──► test of the point ──► ``publication`` ──► <run>-point-0.6

What ``evaluation.remedy`` does within a run, afterwards and by one process. What the base model did
with the test sets is the run's; with the reported halves of the retention sets it is measured
again. The model is measured in float32, which is what is written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from finetune_api.evaluation_results import BASE, TUNED, Row
from finetune_api.remedy import RemedyResult, Scan
from finetune_api.run_spec import CONTRACT_VERSION, RunSpec
from finetune_api.spec import parse_spec
from finetune_trainer.engine.base import fetch_base
from finetune_trainer.engine.checkpointing.dcp import load_weights
from finetune_trainer.engine.checkpointing.dcp_storage import CheckpointReader
from finetune_trainer.engine.memory.profiling import packing_of
from finetune_trainer.engine.model import CPU, build_base, load_tokenizer
from finetune_trainer.engine.task_losses import TASKS
from finetune_trainer.engine.tuning.interpolation import line_of, own_weights
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
from finetune_trainer.publish.run_facts import METRICS_FILE
from finetune_trainer.storage import runfiles
from finetune_trainer.storage.current import CurrentPointer
from finetune_trainer.storage.objects import ObjectNotFound, ObjectStore, Stores
from finetune_trainer.storage.published import MANIFEST, published_file, read_published
from finetune_trainer.storage.run_head import read_head
from finetune_trainer.storage.runfiles import RowAnswers, RunResult, SetAnswers

_NAMES: Final[dict[Scan, str]] = {"Interpolation": "point", "LayerLinear": "layer-linear"}
"""What a scan adds to the name of a run."""


@dataclass(frozen=True)
class PublishedPoint:
    """What was found between the base and the tuned model."""

    remedy: RemedyResult
    uri: str | None = None
    """Address of the chosen model; None: no point qualifies, or it is the tuned model as it is."""
    held: str | None = None
    """Which gates the chosen model misses; without one, those that the run has missed."""


def read_run_spec(
    store: ObjectStore, uri: str, scan: Scan | None = None, points: Sequence[str] = ()
) -> RunSpec:
    """Return the run spec of a published model, with a remedy.

    Args:
        uri: folder of the model.
        scan, points: of the remedy; absent: those of the run's spec, else the defaults.

    Raises:
        UserError: 'ModelNotFound', 'PublishedFileGone'; 'NotTrained', the model is a point already.
        InvalidSpec: the remedy does not go with the run, or its points are no points.
    """
    uri = uri.rstrip("/")
    found = read_published(store, uri)
    if found is None:
        raise UserError("ModelNotFound", f"{uri}/{MANIFEST} does not exist: no run published it")
    manifest = found[0]
    if manifest.point_of is not None:
        raise UserError(
            "NotTrained",
            f"{uri} is a point between two models already; give the model of run"
            f" {manifest.point_of}, which it was made from",
        )
    raw = json.loads(published_file(store, uri, manifest, METRICS_FILE))
    given: dict[str, Any] = {"scan": scan} if scan else {}
    given |= {"points": list(points)} if points else {}
    spec: dict[str, Any] = raw["spec"]
    evaluation = spec.setdefault("evaluation", {})
    evaluation["remedy"] = {"scan": "Interpolation"} | evaluation.get("remedy", {}) | given
    if "source" not in spec["model"]:
        # The other job may have published another model since then.
        spec["model"] = {"source": raw["baseModel"]} | {
            key: value for key, value in spec["model"].items() if key == "storage"
        }
    return RunSpec(
        version=CONTRACT_VERSION, job=manifest.job, run=manifest.run, spec=parse_spec(spec)
    )


def publish_point(run_spec: RunSpec, stores: Stores, scratch: Path) -> PublishedPoint:
    """Choose a point between the base and the tuned model of a run, and publish the model there
    beside the run's. CURRENT.json and latest.json stay.

    Args:
        run_spec: as ``read_run_spec`` returns it, with the storage in use.
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


def _choose(source: _Source, world: World, stores: Stores, scratch: Path) -> _Chosen | RemedyResult:
    """Scan the points, and test and write the model at the chosen one; without a point that is not
    the tuned model's, return what was measured."""
    spec, data, result = source.run_spec.spec, source.data, source.result
    base = fetch_base(source.run_spec, stores, scratch, weights=True)
    if list(base.base.lineage) != result.lineage:
        raise UserError(
            "BaseChanged",
            f"{source.run_spec.base_model.source} is not the model that run"
            f" {source.run_spec.run} began with; publish that one there again",
        )
    packing = packing_of(build_base(base.folder, init="Meta"), spec)
    model = initial_model(base.folder, base.weights(stores), spec)
    torch.nn.Module.to(model, world.device)
    loss = TASKS[spec.task].loss(model, spec.training, None)
    tokenizer = load_tokenizer(base.folder)
    evaluator = evaluator_of(spec, world, data, loss, packing, tokenizer)
    remedy = spec.evaluation.remedy
    assert remedy is not None, "see read_run_spec"
    own = own_weights(model, lambda: None)  # the model has the base's weights until now
    load_weights(source.checkpoint, model)
    found = scan(evaluator, line_of(model, remedy.scan, own), spec.evaluation, source.halves)
    if found.chosen is None or found.chosen == 1:
        return found
    began = time.monotonic()
    retention = answer_sets(evaluator, spec, source.halves, ("retention",))
    seconds = time.monotonic() - began
    load_weights(source.checkpoint, model)  # points were reached by many roundings
    line_of(model, remedy.scan, own).move(found.chosen)
    run_spec = source.run_spec.model_copy(
        update={"run": f"{source.run_spec.run}-{_NAMES[remedy.scan]}-{found.chosen:g}"}
    )
    result = _test(source, run_spec, evaluator, found, retention, seconds, stores.default)
    torch.nn.Module.to(model, CPU)
    loaded = Loaded(model.eval(), tokenizer, base)
    compares = spec.evaluation.artefact_check != "Off"
    return _Chosen(
        run_spec,
        result,
        write(run_spec, stores.default, result, data, loaded, scratch, compares),
    )


def _test(
    source: _Source,
    run_spec: RunSpec,
    evaluator: Evaluator,
    remedy: RemedyResult,
    retention: Sequence[SetAnswers],
    seconds: float,
    store: ObjectStore,
) -> RunResult:
    """Answer the test prompts by the model at the point, and write the working files that publish
    reads below the point's own address; return the result.

    Args:
        retention: what the base model did with the reported halves of the retention sets.
        seconds: that it took.
    """
    spec, old, new = source.run_spec.spec, source.run_spec.run_uri, run_spec.run_uri
    measured = {found.name: found for found in retention}
    base = source.base_row.model_copy(
        update={
            "sets": [measured.get(found.name, found) for found in source.base_row.sets],
            "process_seconds": round(source.base_row.process_seconds + seconds, 3),
        }
    )
    rows = [base, *_other_base_rows(store, old, source.result)]
    began = time.monotonic()
    tuned = _timed(TUNED, answer_sets(evaluator, spec, source.halves), began)
    rows.append(tuned)
    for prompting, questions in read_questions(store, old).items():
        if prompting.tuned:
            row, began = Row(model="Tuned", prompt=prompting.prompt), time.monotonic()
            rows.append(_timed(row, answer_questions(evaluator, spec, questions), began))
    result = source.result.model_copy(
        update={
            "rows": [row.row for row in rows],
            "remedy": remedy,
            "memorisation": None,  # of the tuned model; here it was not measured
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
