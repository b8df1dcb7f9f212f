"""The publish stage.

The model is loaded again from object storage, and compared with the tested one (``artefact``). A
published folder is complete once ``manifest.json`` exists, which is written last; ``latest.json``
beside the folders is updated after it. Publishing is deterministic and idempotent: a retry after an
interruption finds or repeats the work of the first try.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from finetune_api.results import PublishSummary
from finetune_api.run_spec import RunSpec
from finetune_trainer.engine.base import BaseFiles
from finetune_trainer.engine.model import CPU, has_drawn_head, purpose_of
from finetune_trainer.engine.sharding import capacity
from finetune_trainer.failures import UserError
from finetune_trainer.prepared.dataset import PreparedData
from finetune_trainer.prepared.halves import retention_halves
from finetune_trainer.prepared.manifest import read_manifest
from finetune_trainer.publish import export, modelcard, report, run_facts
from finetune_trainer.publish.artefact import ROOM, Artefact, check, not_compared
from finetune_trainer.publish.cases import Compared, tested, trained
from finetune_trainer.publish.files import folder_bytes, move_latest, summarise, upload_folder
from finetune_trainer.publish.measured_sets import measured_sets
from finetune_trainer.publish.overfitting import overfitting
from finetune_trainer.publish.predictions import (
    PREDICTIONS,
    in_use,
    predictions_of,
    write_predictions,
)
from finetune_trainer.publish.results import (
    advice,
    cut,
    evaluate,
    main_result,
    remedy_text,
    with_comparisons,
)
from finetune_trainer.publish.suspects import suspects_hint
from finetune_trainer.publish.task_matrix import matrix_of
from finetune_trainer.storage import runfiles
from finetune_trainer.storage.current import (
    TRIES,
    CurrentPointer,
    contended,
    now,
    used_model,
)
from finetune_trainer.storage.objects import ObjectNotFound, Stores
from finetune_trainer.storage.published import MANIFEST, Manifest, read_published

log = logging.getLogger(__name__)


def publish(run_spec: RunSpec, stores: Stores, scratch: Path) -> PublishSummary:
    """Write the tuned model of a run to its output address, and update ``latest.json``.

    Args:
        scratch: folder for temporary files, with space for the output, and for the base model if a
            merged model is written.

    Raises:
        UserError: 'NotTrained' if the run has no result, 'DataGone' if its prepared data is gone.
        CorruptCheckpoint: files of the chosen checkpoint are missing or changed.
        ArtefactDiffers: the model that was uploaded is not the tested one.
        StorageDenied, StorageUnavailable: the output cannot be written.
    """
    store = stores.default
    try:
        result = runfiles.read_result(store, run_spec.run_uri)
    except ObjectNotFound:
        raise UserError(
            "NotTrained", f"{run_spec.run_uri}/result.json does not exist: training has not ended"
        ) from None
    pointer = None
    if run_spec.spec.output.current is not None:
        pointer = CurrentPointer(store, run_spec.spec.output.destination)
    found = read_published(store, run_spec.output_uri)
    decided = pointer is None or pointer.read().file.has_decided(run_spec.run)
    if found is None or found[0].checkpoint != result.summary.checkpoint or not decided:
        found = _publish(run_spec, stores, result, pointer, scratch)
    evaluation = runfiles.read_evaluation(store, run_spec.run_uri)
    overfit = overfitting(result)
    summary = summarise(run_spec.output_uri, *found).model_copy(
        update={
            "scores": with_comparisons(result.summary.scores, evaluation),
            "main_result": main_result(evaluation),
            "recommendation": advice(evaluation),
            "overfitting": overfit.warning if overfit else None,
            "remedy": cut(remedy_text(result.remedy)),
            "suspect_labels": suspects_hint(result.suspects),
            "held": cut(evaluation.held),
            "became_current": evaluation.held is None if pointer else None,
        }
    )
    move_latest(store, run_spec, summary)
    return summary


def _publish(
    run_spec: RunSpec,
    stores: Stores,
    result: runfiles.RunResult,
    pointer: CurrentPointer | None,
    scratch: Path,
) -> tuple[Manifest, bytes]:
    """Write everything below the output address, and the run's evaluation; return the manifest
    with its text."""
    store, spec = stores.default, run_spec.spec
    folder, papers = scratch / "publish", scratch / "papers"
    for each in (folder, papers):
        shutil.rmtree(each, ignore_errors=True)
        each.mkdir(parents=True)
    store.delete([f"{run_spec.output_uri}/{MANIFEST}"])  # of an earlier try: files change below it
    prepared = runfiles.read_prepared(store, run_spec.run_uri)
    data = read_manifest(store, prepared.uri)
    if data is None:
        raise UserError(
            "DataGone",
            f"{prepared.uri} holds no prepared data any more; give spec.rerunToken a new value"
            " to prepare and train again",
        )
    opened = PreparedData(store, prepared.uri, scratch / "data", data)
    base, formats, compared = write_model(run_spec, stores, result, opened, folder, scratch)
    purpose = purpose_of(spec, data.classes)
    sizes = run_facts.Sizes(
        {name: folder_bytes(folder / name) for name in formats},
        export.full_copy_bytes(base.folder, purpose),
    )
    drawn = has_drawn_head(base.folder, purpose)
    sets = measured_sets(
        store, run_spec.run_uri, result, opened, spec.evaluation.slices,
        retention_halves(opened, spec),
    )  # fmt: skip
    redact = spec.data.quality.personal_data == "Redact"
    lines = (line for each in sets for line in predictions_of(each, redact))
    write_predictions(lines, folder / PREDICTIONS)
    files = upload_folder(store, folder, run_spec.output_uri)
    shutil.rmtree(folder)  # what is loaded again comes from object storage, and needs the disk
    checked = None
    if compared is None and spec.evaluation.artefact_check != "Off":
        checked = not_compared(formats)
    if compared is not None:
        written = Artefact(
            run_spec.output_uri, formats, files, spec.task, base.base.model, base.folder
        )
        checked = check(written, compared, stores, scratch)
    matrix = matrix_of(
        stores.of(run_spec.base_model.storage), result.lineage, sets,
        f"{run_spec.job.name} {run_spec.run}", redact,
    )  # fmt: skip
    data_report = store.get(f"{prepared.uri}/report.json")
    for _ in range(TRIES):
        seen = pointer.read() if pointer else None
        # By another pod of this run, or by a write whose answer was lost.
        decided = seen is not None and seen.file.has_decided(run_spec.run)
        if decided and (found := read_published(store, run_spec.output_uri)) is not None:
            return found
        model = seen.file.current if seen and not decided else None
        used = in_use(store, model, spec.output.destination, sets) if model else None
        evaluation = evaluate(spec, sets, used, result.data_curve)
        evaluation = evaluation.model_copy(
            update={"artefact": checked, "remedy": result.remedy, "matrix": matrix}
        )
        about = run_facts.gather(
            run_spec, result, prepared, data, sizes, base.base.model, evaluation, sets, drawn
        )
        write_documents(about, data_report, papers)
        manifest = Manifest(
            run=run_spec.run,
            job=run_spec.job,
            base_model=base.base.model.source,
            method=spec.method.type,
            lineage=result.lineage,
            checkpoint=result.summary.checkpoint or "",
            formats=formats,
            held=evaluation.held,
            full_copy_bytes=sizes.full_copy,
            files=files | upload_folder(store, papers, run_spec.output_uri),
        )
        text = manifest.to_text()
        runfiles.write_evaluation(store, run_spec.run_uri, evaluation)
        store.put(f"{run_spec.output_uri}/{MANIFEST}", text)
        if pointer is None or seen is None or decided:
            return manifest, text
        new = used_model(run_spec.output_uri, manifest, text) if evaluation.held is None else None
        chosen = seen.file.current is not None or bool(spec.evaluation.gates)
        deciding = [t.name for t in evaluation.sets if chosen and not t.retention]
        if pointer.swap(seen, seen.file.after(run_spec.run, new, deciding, now())):
            return manifest, text
    raise contended(pointer.uri if pointer else "")


def write_model(
    run_spec: RunSpec,
    stores: Stores,
    result: runfiles.RunResult,
    data: PreparedData,
    folder: Path,
    scratch: Path,
) -> tuple[BaseFiles, list[str], Compared | None]:
    """Write the tuned model to ``folder``.

    Returns:
        Its base, the names of the formats written, and the samples by which the published model is
        compared with the tested one; None: it is not compared.
    """
    wanted, manifest = run_spec.spec.effective_output_format, data.manifest
    compares = run_spec.spec.evaluation.artefact_check != "Off"
    untested = compares and not data.set_names("test")
    if untested and wanted == "Adapter" and not _fits(result):
        compares = untested = False
    model, tokenizer, base = export.load_tuned(
        run_spec,
        stores,
        result.summary.checkpoint,
        manifest.classes,
        scratch,
        whole=wanted != "Adapter" or untested,
    )
    compared = None
    if compares:
        compared = (
            trained(data, model)
            if untested
            else tested(run_spec, stores.default, result, data, base.folder)
        )
    formats, stops = [], manifest.stop_token_ids
    if wanted in ("Adapter", "Both"):
        export.write_adapter(
            model, tokenizer, base, run_spec.spec, stops, folder / "adapter", manifest.classes
        )
        formats.append("adapter")
    if wanted in ("Merged", "Both"):
        purpose = purpose_of(run_spec.spec, manifest.classes)
        export.write_merged(model, tokenizer, base.folder, stops, folder / "merged", purpose)
        formats.append("merged")
    return base, formats, compared


def _fits(result: runfiles.RunResult) -> bool:
    """Whether memory has room for the whole model in float32."""
    return ROOM * 4 * result.summary.total_parameters <= capacity(CPU, 1)


def write_documents(about: run_facts.About, data_report: bytes, folder: Path) -> None:
    """Write metrics.json, report.html and README.md."""
    papers = {
        run_facts.METRICS_FILE: run_facts.metrics_text(about),
        "report.html": report.render(about, data_report),
        "README.md": modelcard.render(about),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in papers.items():
        (folder / name).write_text(text, encoding="utf-8")
