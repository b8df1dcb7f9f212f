"""Volume claims as pods see them: ``pvc://claim/path`` lies below one mount point."""

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
    """Path of a ``pvc://claim/path`` address in this pod.

    Raises:
        UserError: 'InvalidAddress' where the path leaves the claim.
    """
    claim, _, path = uri.removeprefix("pvc://").partition("/")
    if ".." in (claim, *path.split("/")):
        raise UserError("InvalidAddress", f"{uri}: '..' is not allowed in the path of a claim")
    return Path(environ.get(ENV_PVC_ROOT, PVC_ROOT)) / claim / path


def etag_of(found: os.stat_result) -> str:
    """Changes with a file's content: its size in bytes, and its last change in nanoseconds."""
    return f"{found.st_size:x}-{found.st_mtime_ns:x}"


def open_listed(path: Path, uri: str, etag: str) -> BinaryIO:
    """A buffered, seekable file of a claim, in the version that was listed.

    The file is looked at behind every read, before its bytes are handed on: of one that is
    rewritten in place nothing new is ever returned, and one that is replaced by renaming is read to
    its end as it was. On network file systems what is seen of it may be some seconds old.

    Raises:
        DataError: 'ObjectChanged', here or from a later read.
    """
    try:
        return cast(BinaryIO, io.BufferedReader(_ListedFile(path, uri, etag), BUFFER_BYTES))
    except FileNotFoundError:
        raise object_changed(uri) from None


class _ListedFile(io.FileIO):
    """The raw file."""

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
