"""Volume claims in a pod: ``pvc://claim/path`` is mounted below one folder."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, cast

from finetune_api.names import ENV_PVC_ROOT, PVC_ROOT
from finetune_trainer.failures import DataError, UserError, object_changed
from finetune_trainer.storage.objectstream import BUFFER_BYTES


def claim_path(uri: str, environ: Mapping[str, str] = os.environ) -> Path:
    """Return the path of a ``pvc://claim/path`` address in this pod.

    Raises:
        UserError: 'InvalidAddress' if the path contains '..'.
    """
    claim, _, path = uri.removeprefix("pvc://").partition("/")
    if ".." in (claim, *path.split("/")):
        raise UserError("InvalidAddress", f"{uri}: '..' is not allowed in the path of a claim")
    return Path(environ.get(ENV_PVC_ROOT, PVC_ROOT)) / claim / path


def etag_of(found: os.stat_result) -> str:
    """Return a version tag of a file: its size in bytes and modification time in nanoseconds."""
    return f"{found.st_size:x}-{found.st_mtime_ns:x}"


def open_listed(path: Path, uri: str, etag: str) -> BinaryIO:
    """Open a claim's file, buffered and seekable, in the version that was listed.

    Each read checks the version tag before it returns bytes: new content of a file that is
    rewritten in place is never returned, and a file that is replaced by a rename is read to its old
    end. On network file systems the tag may be some seconds old.

    Raises:
        DataError: 'ObjectChanged', here or from a later read.
    """
    try:
        return cast(BinaryIO, io.BufferedReader(_ListedFile(path, uri, etag), BUFFER_BYTES))
    except FileNotFoundError:
        raise object_changed(uri) from None


class _ListedFile(io.FileIO):
    """A raw file that checks its version tag after each read."""

    def __init__(self, path: Path, uri: str, etag: str) -> None:
        super().__init__(path)
        self._uri, self._etag = uri, etag
        try:
            self._check()
        except DataError:
            self.close()
            raise

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = super().readinto(buffer)
        self._check()
        return count

    def readall(self) -> bytes:
        data = super().readall()
        self._check()
        return data

    def _check(self) -> None:
        if etag_of(os.fstat(self.fileno())) != self._etag:
            raise object_changed(self._uri)
