"""The publish stage.

A published folder is complete once ``manifest.json`` exists, which is written last; ``latest.json``
beside the folders is updated after it. Publishing is deterministic and idempotent: a retry after an
interruption finds or repeats the work of the first try.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from finetune_api.results import PublishSummary
from finetune_api.run_spec import RunSpec
from finetune_trainer.engine.base import BaseFiles
from finetune_trainer.engine.model import has_drawn_head, purpose_of
from finetune_trainer.failures import UserError
from finetune_trainer.prepared.dataset import PreparedData
from finetune_trainer.prepared.manifest import DataManifest, read_manifest
from finetune_trainer.publish import export, modelcard, report, run_facts
from finetune_trainer.publish.files import folder_bytes, move_latest, summarise, upload_folder
from finetune_trainer.publish.results import advice, results_of, with_comparisons
from finetune_trainer.storage import runfiles
from finetune_trainer.storage.objects import ObjectNotFound, Stores
from finetune_trainer.storage.published import MANIFEST, Manifest, read_published


def publish(run_spec: RunSpec, stores: Stores, scratch: Path) -> PublishSummary:
    """Write the tuned model of a run to its output address, and update ``latest.json``.

    Args:
        scratch: folder for temporary files, with space for the output, and for the base model if a
            merged model is written.

    Raises:
        UserError: 'NotTrained' if the run has no result, 'DataGone' if its prepared data is gone.
        CorruptCheckpoint: files of the chosen checkpoint are missing or changed.
        StorageDenied, StorageUnavailable: the output cannot be written.
    """
    store = stores.default
    try:
        result = runfiles.read_result(store, run_spec.run_uri)
    except ObjectNotFound:
        raise UserError(
            "NotTrained", f"{run_spec.run_uri}/result.json does not exist: training has not ended"
        ) from None
    found = read_published(store, run_spec.output_uri)
    if found is None or found[0].checkpoint != result.summary.checkpoint:
        folder = scratch / "publish"
        shutil.rmtree(folder, ignore_errors=True)
        prepared = runfiles.read_prepared(store, run_spec.run_uri)
        data = read_manifest(store, prepared.uri)
        if data is None:
            raise UserError(
                "DataGone",
                f"{prepared.uri} holds no prepared data any more; give spec.rerunToken a new value"
                " to prepare and train again",
            )
        base, formats = write_model(run_spec, stores, result, data, folder, scratch)
        purpose = purpose_of(run_spec.spec, data.classes)
        sizes = run_facts.Sizes(
            {name: folder_bytes(folder / name) for name in formats},
            export.full_copy_bytes(base.folder, purpose),
        )
        drawn = has_drawn_head(base.folder, purpose)
        opened = PreparedData(store, prepared.uri, scratch / "data", data)
        evaluation, examples = results_of(run_spec, store, result, opened)
        runfiles.write_evaluation(store, run_spec.run_uri, evaluation)
        about = run_facts.gather(
            run_spec, result, prepared, data, sizes, base.base.model, evaluation, examples, drawn
        )
        write_documents(about, store.get(f"{prepared.uri}/report.json"), folder)
        manifest = Manifest(
            run=run_spec.run,
            job=run_spec.job,
            base_model=base.base.model.source,
            method=run_spec.spec.method.type,
            lineage=result.lineage,
            checkpoint=result.summary.checkpoint or "",
            formats=formats,
            full_copy_bytes=sizes.full_copy,
            files=upload_folder(store, folder, run_spec.output_uri),
        )
        text = manifest.to_text()
        store.put(f"{run_spec.output_uri}/{MANIFEST}", text)
        found = manifest, text
    else:
        evaluation = runfiles.read_evaluation(store, run_spec.run_uri)
    summary = summarise(run_spec.output_uri, *found)
    summary = summary.model_copy(
        update={
            "scores": with_comparisons(result.summary.scores, evaluation),
            "recommendation": advice(evaluation),
        }
    )
    move_latest(store, run_spec, summary)
    return summary


def write_model(
    run_spec: RunSpec,
    stores: Stores,
    result: runfiles.RunResult,
    data: DataManifest,
    folder: Path,
    scratch: Path,
) -> tuple[BaseFiles, list[str]]:
    """Write the tuned model to ``folder``; return its base and the names of the formats written."""
    wanted = run_spec.spec.effective_output_format
    model, tokenizer, base = export.load_tuned(
        run_spec,
        stores,
        result.summary.checkpoint,
        data.classes,
        scratch,
        whole=wanted != "Adapter",
    )
    formats = []
    if wanted in ("Adapter", "Both"):
        export.write_adapter(
            model, tokenizer, base, run_spec.spec, folder / "adapter", data.classes
        )
        formats.append("adapter")
    if wanted in ("Merged", "Both"):
        stops, purpose = data.stop_token_ids, purpose_of(run_spec.spec, data.classes)
        export.write_merged(model, tokenizer, base.folder, stops, folder / "merged", purpose)
        formats.append("merged")
    return base, formats


def write_documents(about: run_facts.About, data_report: bytes, folder: Path) -> None:
    """Write metrics.json, report.html and README.md."""
    papers = {
        "metrics.json": run_facts.metrics_text(about),
        "report.html": report.render(about, data_report),
        "README.md": modelcard.render(about),
    }
    for name, text in papers.items():
        (folder / name).write_text(text, encoding="utf-8")
