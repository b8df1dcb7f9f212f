"""Published models: their manifest, and the base that a run derives from a published folder.

    <destination>/<run>/  manifest.json, merged/ (a whole model) and/or adapter/

A published adapter is always a single adapter of a whole model (``engine.adaptersum`` ensures
this), so a base has at most one adapter on top of a whole model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
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
from finetune_trainer.storage.claim_paths import check_inside, claim_path
from finetune_trainer.storage.filenames import is_plain
from finetune_trainer.storage.objects import ObjectNotFound, ObjectStore, Stores, file_info

MANIFEST: Final = "manifest.json"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
_MOST_BYTES: Final = 1 << 30
_PICKLES: Final = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


class PublishedFile(Record):
    """Size and checksum by which a reader verifies a file."""

    bytes: int
    """Size in bytes."""
    sha256: str
    """sha256 of the file, hexadecimal."""


class Manifest(Record):
    """``manifest.json`` of a published model."""

    run: str
    """Run that published the model."""
    job: JobIdentity
    """Job that owns the run."""
    base_model: str
    """Address of the whole model that the run started from, on which an adapter is loaded."""
    method: MethodName
    """Tuning method of the run; of None there are results and no model."""
    lineage: list[Ancestor]
    """Models that the run started from, oldest first."""
    checkpoint: str
    """Address of the published checkpoint; empty without a model."""
    formats: list[str]
    """Folders beside this file: adapter, merged."""
    held: str | None = None
    """Which gates the run missed, or how the current model is better; None: it is not held."""
    point_of: str | None = None
    """Run from whose tuned model ``finetune interpolate`` made this one; None: the run's own."""
    full_copy_bytes: int = 0
    """Bytes of a whole model's weights in the dtype of the base."""
    files: dict[str, PublishedFile]
    """All other files, by name relative to the manifest's folder."""

    def to_text(self) -> bytes:
        return (json.dumps(self.to_json(), sort_keys=True, indent=1) + "\n").encode()


@dataclass(frozen=True)
class Base:
    """The model that a run starts from."""

    model: ModelLocation
    """A whole model, in Hugging Face layout."""
    lineage: tuple[Ancestor, ...]
    """Models that the run's model is derived from, oldest first."""
    adapter: ModelLocation | None = None
    """A published adapter to merge into the model."""
    adapter_files: tuple[tuple[str, PublishedFile], ...] = ()
    """The adapter's files by name, with size and checksum."""


def read_published(store: ObjectStore, uri: str) -> tuple[Manifest, bytes] | None:
    """Return a published model's manifest and its text; None if the model is absent or
    incomplete."""
    try:
        text = store.get(f"{uri}/{MANIFEST}")
    except ObjectNotFound:
        return None
    return Manifest.model_validate_json(text), text


def published_file(store: ObjectStore, uri: str, manifest: Manifest, name: str) -> bytes:
    """Return a file of a published model, as the run wrote it.

    Raises:
        UserError: 'PublishedFileGone', the model has no such file, a very large one (it is read
            into memory), or one that has changed.
    """
    known = manifest.files.get(name)
    if known is None or known.bytes > _MOST_BYTES:
        raise UserError("PublishedFileGone", f"{uri} has no {name}, or a very large one")
    try:
        text = store.get(f"{uri}/{name}")
    except ObjectNotFound:
        text = b""
    if hashlib.sha256(text).hexdigest() != known.sha256:
        raise UserError(
            "PublishedFileGone",
            f"{uri}/{name} is not the file that run {manifest.run} published (sha256"
            f" {known.sha256}): it was removed, or has changed; restore it",
        )
    return text


def find_base(run_spec: RunSpec, stores: Stores) -> Base:
    """Return the base of the run, resolved by the base model's manifest if a run published it.

    Raises:
        UserError: 'ModelNotFound' if a referenced job's model is gone; 'BaseChanged' if it differs
            from the model that the run began with; 'NotMergeable' if its adapter cannot be merged;
            'NoModelPublished' if the run has only evaluated a model.
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
    if not METHODS[manifest.method].trains:
        raise UserError(
            "NoModelPublished",
            f"{location.source}: run {manifest.run} of job {manifest.job.name} has evaluated"
            f" {manifest.lineage[-1].uri} and published its results, no model; give the address of"
            " that model",
        )
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
    """Return the manifest; None if absent or another program's manifest.json."""
    try:
        return Manifest.model_validate_json(text) if text is not None else None
    except ValidationError:
        return None


def _check_mergeable(location: ModelLocation, manifest: Manifest) -> None:
    if "Merged" in METHODS[manifest.method].formats:
        return
    raise UserError(
        "NotMergeable",
        f"{location.source}: {manifest.method} trains virtual tokens, which cannot be merged into"
        " weights: no other run can start from it. Tune the first model by LoRA, IA3,"
        " Partial or Full, or start from its base model",
    )


def fetch_adapter(base: Base, stores: Stores, folder: Path) -> Path | None:
    """Fetch the adapter of a base and verify it against its manifest.

    Returns:
        ``folder``, or the folder on a claim; None if the base has no adapter.

    Raises:
        UserError: 'BaseChanged' if a file is missing or differs from the published one;
            'UnreadableModel' if the manifest names other files than an adapter's.
    """
    if base.adapter is None:
        return None
    source = base.adapter.source
    on_claim = source.startswith("pvc://")
    _check_names(source, [name for name, _ in base.adapter_files])
    for name, known in base.adapter_files:
        path = claim_path(source) / name if on_claim else folder / name
        try:
            if not on_claim:
                stores.of(base.adapter.storage).download(f"{source}/{name}", path)
            else:
                check_inside(path, source)
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


def _check_names(source: str, names: Sequence[str]) -> None:
    """Check the names in a manifest, which another's job may have written: no file is written
    outside the adapter's folder, and the weights are safetensors (peft would load a pickle)."""
    wrong = [n for n in names if not all(map(is_plain, n.split("/"))) or n.endswith(_PICKLES)]
    if wrong or ADAPTER_WEIGHTS not in names:
        what = f"names {wrong[0]!r}" if wrong else f"does not name {ADAPTER_WEIGHTS}"
        raise UserError(
            "UnreadableModel",
            f"{source}: its {MANIFEST} {what}; an adapter is {ADAPTER_WEIGHTS} with its"
            " configuration; publish that model again",
        )
