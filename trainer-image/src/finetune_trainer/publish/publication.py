"""A published model: its files, what is said about it, and its manifest.

    model in memory ──► folders of the formats (``write``)
        ──► with predictions to object storage, loaded again, compared (``upload``)
        ──► rows of all sets, gates, report, card, manifest.json (``judge``)

A folder is complete once ``manifest.json`` exists, which is written last.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_api.evaluation_results import ArtefactResult, EvaluationResult, TaskMatrix
from finetune_api.judge import JudgeResult
from finetune_api.results import PreparedSummary
from finetune_api.run_spec import RunSpec
from finetune_trainer.engine.base import BaseFiles
from finetune_trainer.engine.model import has_drawn_head, purpose_of
from finetune_trainer.failures import UserError
from finetune_trainer.prepared.dataset import PreparedData
from finetune_trainer.prepared.halves import retention_halves
from finetune_trainer.prepared.manifest import read_manifest
from finetune_trainer.publish import export, modelcard, report, run_facts
from finetune_trainer.publish.artefact import Artefact, check, not_compared
from finetune_trainer.publish.cases import Compared, cases_of
from finetune_trainer.publish.files import folder_bytes, upload_folder
from finetune_trainer.publish.judging import Judging
from finetune_trainer.publish.measured_sets import MeasuredSet, measured_sets
from finetune_trainer.publish.predictions import (
    PREDICTIONS,
    InUse,
    predictions_of,
    write_predictions,
)
from finetune_trainer.publish.results import evaluate
from finetune_trainer.publish.scoring import Scorer
from finetune_trainer.publish.task_matrix import matrix_of
from finetune_trainer.storage import runfiles
from finetune_trainer.storage.objects import ObjectStore, Stores
from finetune_trainer.storage.published import MANIFEST, Manifest, PublishedFile


@dataclass(frozen=True)
class Written:
    """A tuned model in files on the local disk."""

    folder: Path
    formats: list[str]
    """Folders in it: adapter, merged."""
    base: BaseFiles
    compared: Compared | None
    """Samples by which the model is compared once it is published; None: it is not."""


@dataclass(frozen=True)
class Upload:
    """The files of a model in object storage, which no manifest names yet."""

    run_spec: RunSpec
    result: runfiles.RunResult
    prepared: PreparedSummary
    data: PreparedData
    base: BaseFiles
    sizes: run_facts.Sizes
    files: dict[str, PublishedFile]
    """Size and checksum, by name relative to the output address."""
    sets: Sequence[MeasuredSet]
    drawn_head: bool
    artefact: ArtefactResult | None
    """The comparison of the uploaded model with the tested one; None: not asked for."""
    matrix: TaskMatrix | None
    """Of the sequence of runs that the model stands in; None: there is none."""
    score: Scorer
    """The user's own metrics."""
    verdicts: JudgeResult | None
    """What the judge model said; None: there is none."""

    @property
    def formats(self) -> list[str]:
        """Folders of the model: adapter, merged."""
        return list(self.sizes.stored)


def open_prepared(store: ObjectStore, uri: str, scratch: Path) -> PreparedData:
    """Open prepared data.

    Raises:
        UserError: 'DataGone'.
    """
    manifest = read_manifest(store, uri)
    if manifest is None:
        raise UserError(
            "DataGone",
            f"{uri} holds no prepared data any more; give spec.rerunToken a new value"
            " to prepare and train again",
        )
    return PreparedData(store, uri, scratch / "data", manifest)


def write(
    run_spec: RunSpec,
    store: ObjectStore,
    result: runfiles.RunResult,
    data: PreparedData,
    loaded: export.Loaded,
    scratch: Path,
    compares: bool,
) -> Written:
    """Write a tuned model to files.

    Args:
        loaded: the model; it is modified.
        compares: whether the published model is to be compared.
    """
    folder = _empty_folder(scratch)
    compared = cases_of(run_spec, store, result, data, loaded) if compares else None
    formats = export.write_formats(loaded, run_spec.spec, data.manifest, folder)
    return Written(folder, formats, loaded.base, compared)


def no_model(base: BaseFiles, scratch: Path) -> Written:
    """Return what a run that trains nothing has written: no format."""
    return Written(_empty_folder(scratch), [], base, None)


def _empty_folder(scratch: Path) -> Path:
    folder = scratch / "publish"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def upload(
    run_spec: RunSpec,
    stores: Stores,
    result: runfiles.RunResult,
    data: PreparedData,
    written: Written,
    scratch: Path,
) -> Upload:
    """Write a tuned model and the answers of all rows below the output address, and check it. The
    files on the local disk are removed.

    Raises:
        ArtefactDiffers: the model that was uploaded is not the tested one.
        UserError: 'MetricNotInstalled', 'MetricFailed', 'JudgeFailed'.
        StorageDenied, StorageUnavailable: the output cannot be written.
    """
    store, spec, base = stores.default, run_spec.spec, written.base
    folder, formats, compared = written.folder, written.formats, written.compared
    store.delete([f"{run_spec.output_uri}/{MANIFEST}"])  # of an earlier try: files change below it
    purpose = purpose_of(spec, data.manifest.classes)
    sizes = run_facts.Sizes(
        {name: folder_bytes(folder / name) for name in formats},
        export.full_copy_bytes(base.folder, purpose),
    )
    drawn = has_drawn_head(base.folder, purpose)
    score, halves = Scorer.of(spec), retention_halves(data, spec)
    measured = measured_sets(store, run_spec.run_uri, result, data, spec, halves)
    sets, verdicts = [score(each) for each in measured], None
    if (judging := Judging.of(spec, store, run_spec.run_uri)) is not None:
        sets, verdicts = judging(sets)
    redact = spec.data.quality.personal_data == "Redact"
    lines = (line for each in sets for line in predictions_of(each, redact))
    write_predictions(lines, folder / PREDICTIONS)
    files = upload_folder(store, folder, run_spec.output_uri)
    shutil.rmtree(folder)  # what is loaded again comes from object storage, and needs the disk
    checked = None
    if compared is None and formats and spec.evaluation.artefact_check != "Off":
        checked = not_compared(formats)
    if compared is not None:
        artefact = Artefact(
            run_spec.output_uri, formats, files, spec.task, base.base.model, base.folder
        )
        checked = check(artefact, compared, stores, scratch)
    matrix = None
    if spec.method.kind.trains:
        matrix = matrix_of(
            stores.of(run_spec.base_model.storage), result.lineage, sets,
            f"{run_spec.job.name} {run_spec.run}", spec.evaluation.kinds, redact,
        )  # fmt: skip
    prepared = runfiles.read_prepared(store, run_spec.run_uri)
    return Upload(
        run_spec, result, prepared, data, base, sizes, files, sets, drawn, checked, matrix, score,
        verdicts,
    )  # fmt: skip


def judge(
    uploaded: Upload, store: ObjectStore, used: InUse | None, scratch: Path, of: str | None = None
) -> tuple[Manifest, bytes]:
    """Decide the gates of an uploaded model, write what is said about it and its manifest, which
    makes it a published one; return the manifest with its text.

    Args:
        used: the model in use at the destination; None: there is none, or it is not compared.
        of: ``Manifest.point_of``.
    """
    run_spec, result = uploaded.run_spec, uploaded.result
    papers = scratch / "papers"
    shutil.rmtree(papers, ignore_errors=True)
    evaluation = evaluate(
        run_spec.spec, uploaded.sets, used, uploaded.score, result.data_curve
    ).model_copy(
        update={
            "artefact": uploaded.artefact,
            "remedy": result.remedy,
            "matrix": uploaded.matrix,
            "judge": uploaded.verdicts,
        }
    )
    _write_documents(uploaded, evaluation, store, papers)
    manifest = Manifest(
        run=run_spec.run,
        job=run_spec.job,
        base_model=uploaded.base.base.model.source,
        method=run_spec.spec.method.type,
        lineage=result.lineage,
        checkpoint=result.summary.checkpoint or "",
        formats=uploaded.formats,
        held=evaluation.held,
        point_of=of,
        full_copy_bytes=uploaded.sizes.full_copy,
        files=uploaded.files | upload_folder(store, papers, run_spec.output_uri),
    )
    text = manifest.to_text()
    runfiles.write_evaluation(store, run_spec.run_uri, evaluation)
    store.put(f"{run_spec.output_uri}/{MANIFEST}", text)
    return manifest, text


def _write_documents(
    uploaded: Upload, evaluation: EvaluationResult, store: ObjectStore, folder: Path
) -> None:
    """Write metrics.json, report.html and, beside a model, README.md."""
    about = run_facts.gather(
        uploaded.run_spec, uploaded.result, uploaded.prepared, uploaded.data.manifest,
        uploaded.sizes, uploaded.base.base.model, evaluation, uploaded.sets, uploaded.drawn_head,
    )  # fmt: skip
    data_report = store.get(f"{uploaded.prepared.uri}/report.json")
    papers = {
        run_facts.METRICS_FILE: run_facts.metrics_text(about),
        "report.html": report.render(about, data_report),
    }
    if uploaded.formats:
        papers["README.md"] = modelcard.render(about)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in papers.items():
        (folder / name).write_text(text, encoding="utf-8")
