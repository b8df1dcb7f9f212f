"""Weights of models on a disk of the node, kept for the next gang that wants the same.

    <cache>/<digest>/        the files, put in place when they are all there
    <cache>/<digest>.lock    locked by whoever reads or fills the folder, so that it stays
    <cache>/<digest>.filling locked by the one who fills it

The digest is that of the listing (server, addresses, sizes, ETags): whoever asks has listed the
objects with their own credentials. A cache is a convenience: where it has no room, or cannot be
written to, weights are read as without one. Locks go with the process that holds them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Final

from finetune_trainer.storage.objects import ObjectInfo, ObjectStore
from finetune_trainer.storage.weights import model_changed

log = logging.getLogger(__name__)

FREE_SHARE: Final = 0.2
"""Of the disk, left to others: a kubelet evicts pods where little is free."""
_PARALLEL_FILES: Final = 4
_LOCK: Final = ".lock"
_FILLING: Final = ".filling"
_PARTIAL: Final = ".partial"


def cached(
    cache: Path, store: ObjectStore, objects: Sequence[ObjectInfo]
) -> tuple[Path, IO[Any]] | None:
    """A folder that holds the objects by the last part of their names, and what keeps it while it
    is held open. None where there cannot be one.

    Raises:
        StorageUnavailable, StorageDenied: where objects cannot be fetched.
        UserError: 'ModelChanged' where one is no longer what was listed.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        return _Entry(cache, store, objects).take()
    except OSError as error:
        log.warning("weights are read without the cache %s: %s", cache, error)
        return None


class _Entry:
    """The folder of one content."""

    def __init__(self, cache: Path, store: ObjectStore, objects: Sequence[ObjectInfo]) -> None:
        self._cache, self._store, self._objects = cache, store, objects
        listed = [(info.uri, info.size, info.etag) for info in objects]
        text = json.dumps([store.endpoint, sorted(listed)])
        self._folder = cache / hashlib.sha256(text.encode()).hexdigest()

    def take(self) -> tuple[Path, IO[Any]] | None:
        """As ``cached``; where another process of the node fills it, that is waited for."""
        lock = self._folder.with_suffix(_LOCK).open("ab")
        with self._folder.with_suffix(_FILLING).open("ab") as filling:
            fcntl.flock(filling, fcntl.LOCK_EX)
            fcntl.flock(lock, fcntl.LOCK_SH)
            if not self._folder.exists() and not self._fill():
                lock.close()
                return None
        os.utime(self._folder)  # when it was last wanted
        return self._folder, lock

    def _fill(self) -> bool:
        """Fetch the files; whether there was room."""
        partial = self._folder.with_suffix(_PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
        size = sum(info.size for info in self._objects)
        if not self._make_room(size):
            log.warning(
                "weights are read without the cache %s: %d MiB beside a fifth of the disk, which"
                " is left to others, are not free there", self._cache, size >> 20,
            )  # fmt: skip
            return False
        partial.mkdir()
        try:
            with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
                list(pool.map(lambda info: self._fetch(info, partial), self._objects))
            partial.rename(self._folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return True

    def _fetch(self, info: ObjectInfo, folder: Path) -> None:
        path = folder / info.uri.rpartition("/")[2]
        self._store.download(info.uri, path)
        found = self._store.head(info.uri)
        if found != info or path.stat().st_size != info.size:
            raise model_changed(info)

    def _make_room(self, size: int) -> bool:
        """Remove what was wanted least lately and is not in use, as far as needed."""
        entries = [path for path in self._cache.iterdir() if path.is_dir()]
        for entry in [None, *sorted(entries, key=lambda path: path.stat().st_mtime)]:
            if entry is not None:
                _remove_unused(entry)
            usage = shutil.disk_usage(self._cache)
            if usage.free - size >= usage.total * FREE_SHARE:
                return True
        return False


def _remove_unused(folder: Path) -> None:
    """Remove a folder that no process holds."""
    with folder.with_suffix(_LOCK).open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        shutil.rmtree(folder)
