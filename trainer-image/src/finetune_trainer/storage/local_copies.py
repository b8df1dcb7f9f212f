"""Copies of the newest checkpoint's files on the disk of the node that wrote them.

A restart in place reads its checkpoint from here, and nothing from storage. Storage stays the
truth: readers verify every part of a copy by the checksums that HEAD leads to, and read from
storage what differs or is missing (as after the replacement of a pod). So a copy may be incomplete
or damaged, and a failure to write one is only logged.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

FREE_SHARE: Final = 0.2
"""Share of the disk that a copy leaves free: below, the kubelet would evict pods."""
_WRITE_BYTES: Final = 16 << 20

Pieces = Iterable[bytes | memoryview]


@dataclass
class LocalCopies:
    """Copies of one checkpoint's files in a folder that all processes of the node share."""

    folder: Path
    read: int = 0
    """Bytes read from copies."""
    missed: int = 0
    """Bytes that were not there."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    """Parts are read in several threads."""

    def keep(self, uri: str, files: Mapping[str, Pieces]) -> None:
        """Replace this process's copies by copies of files of another checkpoint.

        Args:
            uri: of the checkpoint, which must be valid. Copies of all others are removed.
            files: content by name below ``uri``.
        """
        place = self._place(uri)
        try:
            self._remove_others(place)
            place.mkdir(parents=True, exist_ok=True)
            for name, pieces in files.items():
                self._write(place / name, [memoryview(piece) for piece in pieces])
        except OSError as error:
            log.warning("no copy of %s on this node: %s", uri, error)

    def get(self, uri: str, name: str, start: int, stop: int, sha256: bytes) -> bytes | None:
        """Return bytes of a file of a checkpoint; None: the copy does not have them."""
        data = b""
        with suppress(OSError), (self._place(uri) / name).open("rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        there = hashlib.sha256(data).digest() == sha256
        with self._lock:
            self.read += len(data) if there else 0
            self.missed += 0 if there else stop - start
        return data if there else None

    def _place(self, uri: str) -> Path:
        return self.folder / hashlib.sha256(uri.encode()).hexdigest()[:16]

    def _remove_others(self, place: Path) -> None:
        for other in self.folder.glob("*"):
            if other != place:
                shutil.rmtree(other, ignore_errors=True)

    def _write(self, path: Path, pieces: list[memoryview]) -> None:
        size = sum(piece.nbytes for piece in pieces)
        disk = shutil.disk_usage(path.parent)
        if disk.free - size < FREE_SHARE * disk.total:
            log.info("no copy of %s on this node: %d bytes are free", path.name, disk.free)
            return
        try:
            with path.open("wb", buffering=0) as file:
                for piece in pieces:
                    for start in range(0, piece.nbytes, _WRITE_BYTES):
                        _write_all(file.fileno(), piece[start : start + _WRITE_BYTES])
        except OSError:
            path.unlink(missing_ok=True)
            raise


def _write_all(descriptor: int, data: memoryview) -> None:
    """Write all bytes; a full disk may take a part of them first."""
    while data:
        data = data[os.write(descriptor, data) :]
