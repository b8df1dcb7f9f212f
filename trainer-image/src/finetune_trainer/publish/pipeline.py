"""The publish stage.

    result.json, checkpoint ──► ``publication``: write, upload, judge ──► CURRENT.json, latest.json

The model is loaded again from object storage, and compared with the tested one (``artefact``).
``latest.json`` beside the folders is updated once the model is published. Publishing is
deterministic and idempotent: a retry after an interruption finds or repeats the work of the first
try.
"""

from __future__ import annotations

from pathlib import Path

from finetune_api.results import PublishSummary
from finetune_api.run_spec import RunSpec
from finetune_trainer.engine.base import fetch_base
from finetune_trainer.engine.model import CPU
from finetune_trainer.engine.sharding import capacity
from finetune_trainer.failures import UserError
from finetune_trainer.prepared.dataset import PreparedData
from finetune_trainer.publish.artefact import ROOM
from finetune_trainer.publish.export import load_tuned
from finetune_trainer.publish.files import move_latest, summarise
from finetune_trainer.publish.overfitting import overfitting
from finetune_trainer.publish.predictions import in_use
from finetune_trainer.publish.publication import (
    Written,
    judge,
    no_model,
    open_prepared,
    upload,
    write,
)
from finetune_trainer.publish.results import (
    advice,
    cut,
    main_result,
    remedy_text,
    with_comparisons,
)
from finetune_trainer.publish.suspects import suspects_hint
from finetune_trainer.storage import runfiles
from finetune_trainer.storage.current import (
    TRIES,
    CurrentPointer,
    contended,
    now,
    used_model,
)
from finetune_trainer.storage.objects import ObjectNotFound, Stores
from finetune_trainer.storage.published import Manifest, read_published


def publish(run_spec: RunSpec, stores: Stores, scratch: Path) -> PublishSummary:
    """Write the tuned model of a run to its output address, and update ``latest.json``. A run that
    trains nothing writes its results alone, to which ``latest.json`` does not point.

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
    checkpoint = result.summary.checkpoint or ""
    if found is None or found[0].checkpoint != checkpoint or not decided:
        found = _publish(run_spec, stores, result, pointer, scratch)
    evaluation = runfiles.read_evaluation(store, run_spec.run_uri)
    overfit = overfitting(result)
    summary = summarise(run_spec.output_uri, *found).model_copy(
        update={
            "scores": with_comparisons(result.summary.scores, evaluation),
            "main_result": main_result(evaluation, run_spec.spec.evaluation.kinds),
            "recommendation": advice(evaluation),
            "overfitting": overfit.warning if overfit else None,
            "remedy": cut(remedy_text(result.remedy)),
            "suspect_labels": suspects_hint(result.suspects),
            "held": cut(evaluation.held),
            "became_current": evaluation.held is None if pointer else None,
        }
    )
    if run_spec.spec.method.kind.trains:
        move_latest(store, run_spec, summary)
    return summary


def _publish(
    run_spec: RunSpec,
    stores: Stores,
    result: runfiles.RunResult,
    pointer: CurrentPointer | None,
    scratch: Path,
) -> tuple[Manifest, bytes]:
    """Write everything below the output address, and the run's evaluation; move CURRENT.json if it
    is asked for. Return the manifest with its text."""
    store, spec = stores.default, run_spec.spec
    data = open_prepared(store, runfiles.read_prepared(store, run_spec.run_uri).uri, scratch)
    written = _write(run_spec, stores, result, data, scratch)
    uploaded = upload(run_spec, stores, result, data, written, scratch)
    for _ in range(TRIES):
        seen = pointer.read() if pointer else None
        # By another pod of this run, or by a write whose answer was lost.
        decided = seen is not None and seen.file.has_decided(run_spec.run)
        if decided and (found := read_published(store, run_spec.output_uri)) is not None:
            return found
        model = seen.file.current if seen and not decided else None
        used = in_use(store, model, spec.output.destination, uploaded.sets) if model else None
        manifest, text = judge(uploaded, store, used, scratch)
        if pointer is None or seen is None or decided:
            return manifest, text
        new = used_model(run_spec.output_uri, manifest, text) if manifest.held is None else None
        chosen = seen.file.current is not None or bool(spec.evaluation.gates)
        deciding = [each.name for each in uploaded.sets if chosen and not each.retention]
        if pointer.swap(seen, seen.file.after(run_spec.run, new, deciding, now())):
            return manifest, text
    raise contended(pointer.uri if pointer else "")


def _write(
    run_spec: RunSpec,
    stores: Stores,
    result: runfiles.RunResult,
    data: PreparedData,
    scratch: Path,
) -> Written:
    """Write the tuned model of a run to files; memory is free of it afterwards."""
    if not run_spec.spec.method.kind.trains:
        return no_model(fetch_base(run_spec, stores, scratch, weights=False), scratch)
    whole = run_spec.spec.effective_output_format != "Adapter"
    compares = run_spec.spec.evaluation.artefact_check != "Off"
    untested = compares and not data.set_names("test")
    if untested and not whole and not _fits(result):
        compares = untested = False
    loaded = load_tuned(
        run_spec, stores, result.summary.checkpoint, data.manifest.classes, scratch,
        whole=whole or untested,
    )  # fmt: skip
    return write(run_spec, stores.default, result, data, loaded, scratch, compares)


def _fits(result: runfiles.RunResult) -> bool:
    """Whether memory has room for the whole model in float32."""
    return ROOM * 4 * result.summary.total_parameters <= capacity(CPU, 1)
