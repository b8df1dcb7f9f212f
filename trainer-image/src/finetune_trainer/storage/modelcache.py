"""Weights of models on a disk of the node, kept for the next gang that wants the same.

    <cache>/<digest>/         the files, put in place when they are all there
    <cache>/<digest>.partial/ on their way in, with all their room taken, or on their way out
    <cache>/<digest>.lock     locked by whoever reads or fills the folder, so that it stays
    <cache>/<digest>.filling  locked by the one who fills it
    <cache>/room.lock         locked by the one who makes room and takes it

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
"""Of the disk, left to others: a kubelet evicts pods where little is free."""
_PARALLEL_FILES: Final = 4
_LOCK: Final = ".lock"
_FILLING: Final = ".filling"
_PARTIAL: Final = ".partial"
_ROOM: Final = "room.lock"
_OURS: Final = re.compile(rf"[0-9a-f]{{64}}({re.escape(_PARTIAL)})?")
"""Folders of the cache; others beside them are left alone."""


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
    """The folder of one listing."""

    def __init__(self, cache: Path, store: ObjectStore, objects: Sequence[ObjectInfo]) -> None:
        self._cache, self._store = cache, store
        self._objects = {info.uri.rpartition("/")[2]: info for info in objects}
        listed = [(info.uri, info.size, info.etag) for info in objects]
        text = json.dumps([store.endpoint, sorted(listed)])
        self._folder = cache / hashlib.sha256(text.encode()).hexdigest()
        self._partial = self._folder.with_suffix(_PARTIAL)

    def take(self) -> tuple[Path, IO[Any]] | None:
        """As ``cached``; where another process of the node fills it, that is waited for."""
        lock = _open_lock(self._folder.with_suffix(_LOCK))
        with _open_lock(self._folder.with_suffix(_FILLING)) as filling:
            fcntl.flock(filling, fcntl.LOCK_EX)
            fcntl.flock(lock, fcntl.LOCK_SH)
            if not self._whole() and not self._fill():
                lock.close()
                return None
        with suppress(OSError):  # of another user's folder the time stays
            os.utime(self._folder)  # when it was last wanted
        return self._folder, lock

    def _whole(self) -> bool:
        """Whether the folder is there, with all files in their sizes."""
        if not self._folder.exists():
            return False
        found = {path.name: path.stat().st_size for path in self._folder.iterdir()}
        return found == {name: info.size for name, info in self._objects.items()}

    def _fill(self) -> bool:
        """Fetch the files; whether there was room. They are on the disk before they are in place:
        a node that loses its power then has all of them, or none."""
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
        """Make the files, in their sizes; whether there was room. One process of the node at a
        time: what the next one finds free, nobody else is about to fill."""
        size = sum(info.size for info in self._objects.values())
        with _open_lock(self._cache / _ROOM) as room:
            fcntl.flock(room, fcntl.LOCK_EX)
            for entry in (self._partial, self._folder):  # of one that was killed; not whole
                if entry.exists():
                    _remove(entry)
            if not _make_room(self._cache, size):
                log.warning(
                    "weights are read without the cache %s: %d MiB beside a fifth of the disk,"
                    " which is left to others, are not free there", self._cache, size >> 20,
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


def _make_room(cache: Path, size: int) -> bool:
    """Remove what was wanted least lately and is not in use, as far as needed; nothing, where all
    of it would not be enough."""

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
    """Lock a folder that no process holds and that this one may remove; whether it is one."""
    try:
        lock = locks.enter_context(_open_lock(entry.with_suffix(_LOCK)))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return os.access(entry, os.W_OK | os.X_OK)


def _open_lock(path: Path) -> IO[Any]:
    """A lock's file, made where there is none. Another user's may be read, which is enough."""
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_CREAT, 0o666), "rb")


def _remove(entry: Path) -> None:
    """Remove a folder that is locked. It loses its name first: half of it is never taken for it."""
    partial = entry.with_suffix(_PARTIAL)
    if entry != partial:
        entry.rename(partial)
    shutil.rmtree(partial)


def _bytes_of(entry: Path) -> int:
    return sum(path.stat().st_size for path in entry.iterdir())


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
