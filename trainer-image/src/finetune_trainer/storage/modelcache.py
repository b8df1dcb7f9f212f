"""Node-local cache of model weights, shared by runs that read the same model.

    <cache>/<digest>/         the complete files, renamed into place
    <cache>/<digest>.partial/ files being fetched (disk space reserved) or being removed
    <cache>/<digest>.lock     shared lock of processes that fill or read the folder: no eviction
    <cache>/<digest>.filling  exclusive lock of the process that fills the folder
    <cache>/room.lock         exclusive lock for evicting folders and reserving disk space

The digest covers the listing (server, addresses, sizes, ETags), so a process finds a folder only
after listing the objects with its own credentials. The cache is optional: without disk space or
write permission, weights are read from object storage. Locks end with their process.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any, Final

from finetune_trainer.storage.objects import ObjectInfo, ObjectStore
from finetune_trainer.storage.weight_reader import model_changed

log = logging.getLogger(__name__)

FREE_SHARE: Final = 0.2
"""Share of the disk that stays free: a kubelet evicts pods when little is free."""
_PARALLEL_FILES: Final = 4
_LOCK: Final = ".lock"
_FILLING: Final = ".filling"
_PARTIAL: Final = ".partial"
_ROOM: Final = "room.lock"
_OURS: Final = re.compile(rf"[0-9a-f]{{64}}({re.escape(_PARTIAL)})?")
"""Names of cache folders; other folders are left alone."""


def cached(
    cache: Path, store: ObjectStore, objects: Sequence[ObjectInfo]
) -> tuple[Path, IO[Any]] | None:
    """Return a folder with the objects, named by the last part of their keys, and an open lock file
    that prevents eviction until it is closed. None if the cache cannot be used.

    Raises:
        StorageUnavailable, StorageDenied: objects cannot be fetched.
        UserError: 'ModelChanged' if an object differs from the listing.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        return _Entry(cache, store, objects).take()
    except OSError as error:
        log.warning("weights are read without the cache %s: %s", cache, error)
        return None


class _Entry:
    """The cache folder of one listing."""

    def __init__(self, cache: Path, store: ObjectStore, objects: Sequence[ObjectInfo]) -> None:
        self._cache, self._store = cache, store
        self._objects = {info.uri.rpartition("/")[2]: info for info in objects}
        listed = [(info.uri, info.size, info.etag) for info in objects]
        text = json.dumps([store.endpoint, sorted(listed)])
        self._folder = cache / hashlib.sha256(text.encode()).hexdigest()
        self._partial = self._folder.with_suffix(_PARTIAL)

    def take(self) -> tuple[Path, IO[Any]] | None:
        """Return the same as ``cached``; wait while another process of the node fills the
        folder."""
        lock = _open_lock(self._folder.with_suffix(_LOCK))
        with _open_lock(self._folder.with_suffix(_FILLING)) as filling:
            fcntl.flock(filling, fcntl.LOCK_EX)
            fcntl.flock(lock, fcntl.LOCK_SH)
            if not self._whole() and not self._fill():
                lock.close()
                return None
        with suppress(OSError):  # fails on another user's folder
            os.utime(self._folder)  # time of the last use
        return self._folder, lock

    def _whole(self) -> bool:
        """Return whether the folder exists with exactly the listed files and sizes."""
        if not self._folder.exists():
            return False
        found = {path.name: path.stat().st_size for path in self._folder.iterdir()}
        return found == {name: info.size for name, info in self._objects.items()}

    def _fill(self) -> bool:
        """Fetch the files; return False if the disk space is missing. Files are synced before the
        folder is renamed, so that after a power loss it has all of them or none."""
        try:
            if not self._take_room():
                return False
            with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
                list(pool.map(self._fetch, self._objects))
            _sync(self._partial)
            self._partial.rename(self._folder)
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)
        return True

    def _take_room(self) -> bool:
        """Allocate the files in full size; return False if the disk space is missing. Only one
        process of the node at a time, so that the space it finds free is not taken meanwhile."""
        size = sum(info.size for info in self._objects.values())
        with _open_lock(self._cache / _ROOM) as room:
            fcntl.flock(room, fcntl.LOCK_EX)
            for entry in (self._partial, self._folder):  # left by a killed process; incomplete
                if entry.exists():
                    _remove(entry)
            if not _evict(self._cache, size):
                log.warning(
                    "weights are read without the cache %s: %d MiB do not fit beside the fifth of"
                    " the disk that stays free", self._cache, size >> 20,
                )  # fmt: skip
                return False
            self._partial.mkdir()
            for name, info in self._objects.items():
                with (self._partial / name).open("xb") as file:
                    if info.size:
                        os.posix_fallocate(file.fileno(), 0, info.size)
        return True

    def _fetch(self, name: str) -> None:
        info, path = self._objects[name], self._partial / name
        with path.open("r+b") as file:
            self._store.download_into(info.uri, file)
        _sync(path)
        if self._store.head(info.uri) != info or path.stat().st_size != info.size:
            raise model_changed(info)


def _evict(cache: Path, size: int) -> bool:
    """Remove the least recently used unlocked folders until ``size`` bytes fit; return whether they
    do. Remove nothing if removing all of them would not suffice."""

    def lacking() -> float:
        usage = shutil.disk_usage(cache)
        return size + usage.total * FREE_SHARE - usage.free

    if lacking() <= 0:
        return True
    with ExitStack() as locks:
        entries = [path for path in cache.iterdir() if _OURS.fullmatch(path.name)]
        unused = [entry for entry in entries if _lock_unused(entry, locks)]
        if lacking() > sum(_bytes_of(entry) for entry in unused):
            return False
        for entry in sorted(unused, key=lambda path: path.stat().st_mtime):
            try:
                _remove(entry)
            except OSError as error:
                log.warning("%s stays in the cache of models: %s", entry, error)
            if lacking() <= 0:
                return True
    return False


def _lock_unused(entry: Path, locks: ExitStack) -> bool:
    """Lock a folder for removal; return False if it is in use or not writable by this process."""
    try:
        lock = locks.enter_context(_open_lock(entry.with_suffix(_LOCK)))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return os.access(entry, os.W_OK | os.X_OK)


def _open_lock(path: Path) -> IO[Any]:
    """Open a lock file, created if absent. Read-only, which suffices for another user's file."""
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_CREAT, 0o666), "rb")


def _remove(entry: Path) -> None:
    """Remove a locked folder. Rename it first, so that a half-removed folder is not used."""
    partial = entry.with_suffix(_PARTIAL)
    if entry != partial:
        entry.rename(partial)
    shutil.rmtree(partial)


def _bytes_of(entry: Path) -> int:
    return sum(path.stat().st_size for path in entry.iterdir())


def _sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
