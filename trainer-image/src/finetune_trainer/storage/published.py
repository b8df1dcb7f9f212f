"""Published models: the manifest that makes a folder one, and what a run starts from when it is
given such a folder.

    <destination>/<run>/  manifest.json, merged/ (a whole model) and/or adapter/

A published adapter is always one plain adapter of a whole model (``engine.adaptersum`` sees to
that), so nothing has to be followed further than to that model.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from finetune_api.base import Record
from finetune_api.identity import adapter_uri, merged_uri
from finetune_api.methods import METHODS, MethodName
from finetune_api.results import Ancestor
from finetune_api.run_spec import JobIdentity, RunSpec
from finetune_api.sources import ModelLocation
from finetune_trainer.failures import UserError
from finetune_trainer.storage.claim_paths import claim_path
from finetune_trainer.storage.objects import ObjectNotFound, ObjectStore, Stores, file_info

MANIFEST: Final = "manifest.json"


class PublishedFile(Record):
    """What a reader checks a file by."""

    bytes: int
    """Size."""
    sha256: str
    """Of its bytes, hexadecimal."""


class Manifest(Record):
    """``manifest.json`` of a published model."""

    run: str
    """Run that made it."""
    job: JobIdentity
    """Job of the run."""
    base_model: str
    """Address of the whole model that the run started from; an adapter is loaded on it."""
    method: MethodName
    """Tuning method of the run."""
    lineage: list[Ancestor]
    """What the run's model was made from, the first base model first."""
    checkpoint: str
    """Commit that was published."""
    formats: list[str]
    """adapter, merged: folders beside this file."""
    full_copy_bytes: int = 0
    """What the weights of a whole model take in the dtype of the base."""
    files: dict[str, PublishedFile]
    """Every other file, by name below this folder."""

    def to_text(self) -> bytes:
        return (json.dumps(self.to_json(), sort_keys=True, indent=1) + "\n").encode()


@dataclass(frozen=True)
class Base:
    """What a run starts from."""

    model: ModelLocation
    """A whole model, in Hugging Face layout."""
    lineage: tuple[Ancestor, ...]
    """All that the run's model is made from, the first base model first."""
    adapter: ModelLocation | None = None
    """A published adapter that is merged into it."""
    adapter_files: tuple[tuple[str, PublishedFile], ...] = ()
    """Names of that adapter's files, and what they are checked by."""


def read_published(store: ObjectStore, uri: str) -> tuple[Manifest, bytes] | None:
    """The manifest of a published model and its text, or None where there is no whole one."""
    try:
        text = store.get(f"{uri}/{MANIFEST}")
    except ObjectNotFound:
        return None
    return Manifest.model_validate_json(text), text


def find_base(run_spec: RunSpec, stores: Stores) -> Base:
    """What the run starts from, by the manifest of its base model where that was published by a
    run.

    Raises:
        UserError: 'ModelNotFound' where another job's model is gone; 'BaseChanged' where it is not
            what the run began with; 'NotMergeable' where its weights cannot be part of a model.
    """
    location = run_spec.base_model
    text = _manifest_text(location, stores)
    manifest = _parse(text)
    if manifest is None:
        if run_spec.base is not None:
            raise UserError(
                "ModelNotFound",
                f"{location.source}/{MANIFEST} does not exist any more: the model that"
                f" run {run_spec.base.run} of job {run_spec.base.job} has published was removed."
                " Publish it again, and give spec.rerunToken a new value",
            )
        return Base(location, (Ancestor(uri=location.source),))
    digest = hashlib.sha256(text or b"").hexdigest()
    if run_spec.base is not None and run_spec.base.digest not in (None, digest):
        raise UserError(
            "BaseChanged",
            f"{location.source}/{MANIFEST} is not what this run began with (sha256 {digest},"
            f" then {run_spec.base.digest}); give spec.rerunToken a new value to begin with what is"
            " there",
        )
    itself = Ancestor(
        uri=location.source, job=manifest.job.name, run=manifest.run, digest=digest,
        method=manifest.method, formats=manifest.formats,
    )  # fmt: skip
    lineage = (*manifest.lineage, itself)
    if "merged" in manifest.formats:
        whole = ModelLocation(source=merged_uri(location.source), storage=location.storage)
        return Base(whole, lineage)
    _check_mergeable(location, manifest)
    beneath = run_spec.base.beneath if run_spec.base else None
    storage = beneath.storage if beneath is not None else location.storage
    return Base(
        model=ModelLocation(source=manifest.base_model, storage=storage),
        lineage=lineage,
        adapter=ModelLocation(source=adapter_uri(location.source), storage=location.storage),
        adapter_files=tuple(
            (name.removeprefix("adapter/"), file)
            for name, file in sorted(manifest.files.items())
            if name.startswith("adapter/")
        ),
    )


def _manifest_text(location: ModelLocation, stores: Stores) -> bytes | None:
    if location.source.startswith("s3://"):
        try:
            return stores.of(location.storage).get(f"{location.source.rstrip('/')}/{MANIFEST}")
        except ObjectNotFound:
            return None
    if location.source.startswith("pvc://"):
        path = claim_path(location.source) / MANIFEST
        return path.read_bytes() if path.is_file() else None
    return None


def _parse(text: bytes | None) -> Manifest | None:
    """None for what is another program's manifest.json too."""
    try:
        return Manifest.model_validate_json(text) if text is not None else None
    except ValidationError:
        return None


def _check_mergeable(location: ModelLocation, manifest: Manifest) -> None:
    if "Merged" in METHODS[manifest.method].formats:
        return
    raise UserError(
        "NotMergeable",
        f"{location.source}: {manifest.method} has learned what stands before a text, which no"
        " weights can hold: no other run can start from it. Tune the first model by LoRA, IA3,"
        " Partial or Full, or start from its base model",
    )


def fetch_adapter(base: Base, stores: Stores, folder: Path) -> Path | None:
    """Makes ``folder`` hold the adapter of a base, checked against its manifest; None where it has
    none.

    Raises:
        UserError: 'BaseChanged' where a file is not what was published.
    """
    if base.adapter is None:
        return None
    source = base.adapter.source
    on_claim = source.startswith("pvc://")
    for name, known in base.adapter_files:
        path = claim_path(source) / name if on_claim else folder / name
        try:
            if not on_claim:
                stores.of(base.adapter.storage).download(f"{source}/{name}", path)
            intact = file_info(path).sha256 == known.sha256
        except (ObjectNotFound, FileNotFoundError):
            intact = False
        if not intact:
            raise UserError(
                "BaseChanged",
                f"{source}/{name} is missing, or not what its {MANIFEST} says; publish that model"
                " again",
            )
    return claim_path(source) if on_claim else folder
