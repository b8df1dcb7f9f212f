"""Files of a published model in object storage, and ``latest.json`` of the destination."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from finetune_api.base import Record
from finetune_api.results import PublishSummary
from finetune_api.run_spec import JobIdentity, RunSpec
from finetune_trainer.failures import StorageUnavailable
from finetune_trainer.storage.objects import (
    FileInfo,
    ObjectNotFound,
    ObjectStore,
    PreconditionFailed,
)
from finetune_trainer.storage.published import Manifest, PublishedFile

LATEST: Final = "latest.json"
log = logging.getLogger(__name__)
TRIES: Final = 20
"""Compare-and-swap rounds on latest.json; in each failed round another writer succeeded."""
_PARALLEL_FILES: Final = 4


class Latest(Record):
    """``latest.json``: the newest published run."""

    run: str
    """Identity of the run."""
    job: JobIdentity
    """Job that owns the run."""
    uri: str
    """Address of the model."""
    digest: str
    """sha256 of the model's manifest.json."""

    @property
    def number(self) -> int:
        return int(self.run.partition("-")[0])


def folder_bytes(folder: Path) -> int:
    """Return the size of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def upload_folder(store: ObjectStore, folder: Path, uri: str) -> dict[str, PublishedFile]:
    """Upload all files below a folder; return their sizes and checksums by name."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())

    def upload(name: str) -> FileInfo:
        return store.upload(folder / name, f"{uri}/{name}")

    with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
        infos = list(pool.map(upload, names))
    return {
        name: PublishedFile(bytes=info.bytes, sha256=info.sha256)
        for name, info in zip(names, infos, strict=True)
    }


def download_folder(store: ObjectStore, uri: str, names: Iterable[str], folder: Path) -> None:
    """Download files that ``upload_folder`` has uploaded, by their names, to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
        list(pool.map(lambda name: store.download(f"{uri}/{name}", folder / name), names))


def summarise(uri: str, manifest: Manifest, text: bytes) -> PublishSummary:
    return PublishSummary(
        uri=uri,
        digest=hashlib.sha256(text).hexdigest(),
        formats=manifest.formats,
        bytes=len(text) + sum(file.bytes for file in manifest.files.values()),
        full_copy_bytes=manifest.full_copy_bytes,
    )


def move_latest(store: ObjectStore, run_spec: RunSpec, summary: PublishSummary) -> None:
    """Point ``latest.json`` to this run, unless it names a later run of the same job. A file that
    no run has written is replaced.

    A re-created job (another uid) restarts its run numbers, so it always replaces the old job.

    Raises:
        StorageUnavailable: 'LatestContended' after ``TRIES`` failed rounds.
    """
    uri = f"{run_spec.spec.output.destination.rstrip('/')}/{LATEST}"
    new = Latest(run=run_spec.run, job=run_spec.job, uri=summary.uri, digest=summary.digest)
    text = (json.dumps(new.to_json(), sort_keys=True, indent=1) + "\n").encode()
    for _ in range(TRIES):
        try:
            before, etag = store.get_tagged(uri)
        except ObjectNotFound:
            etag = None
        else:
            if _stays(before, new, uri):
                return
        try:
            store.put(uri, text, if_match=etag, if_absent=etag is None)
            return
        except PreconditionFailed:
            continue  # another run wrote, or our response was lost: read again
    raise StorageUnavailable("LatestContended", f"{uri} could not be moved in {TRIES} tries")


def _stays(text: bytes, new: Latest, uri: str) -> bool:
    """Return whether the present file names this or a later run; log a file of another format."""
    try:
        old = Latest.model_validate_json(text)
        later = old.job.uid == new.job.uid and old.number > new.number
    except ValueError:
        log.warning("%s was not written by a run; it is replaced", uri)
        return False
    return old == new or later
