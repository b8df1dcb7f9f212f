"""Volume claims in a pod: ``pvc://claim/path`` is mounted below one folder.

Others may write to a claim. So its symbolic links are followed only within it (the pod's own files
hold credentials), and only regular files are opened (a named pipe would block for ever).
"""

from __future__ import annotations

import io
import os
import stat
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
        UserError: 'OutsideClaim', a symbolic link leads out of the claim.
    """
    check_inside(path, uri)
    try:
        return cast(BinaryIO, io.BufferedReader(_ListedFile(path, uri, etag), BUFFER_BYTES))
    except FileNotFoundError:
        raise object_changed(uri) from None


class _ListedFile(io.FileIO):
    """A raw file that checks its version tag after each read."""

    def __init__(self, path: Path, uri: str, etag: str) -> None:
        super().__init__(path, opener=_open)
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
        found = os.fstat(self.fileno())
        if etag_of(found) != self._etag or not stat.S_ISREG(found.st_mode):
            raise object_changed(self._uri)


def _open(path: str, flags: int) -> int:
    """Open a file; do not wait for the writer of a named pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def check_inside(path: Path, uri: str) -> None:
    """Refuse a file to which a symbolic link leads out of its claim. In `finetune run` claims are
    links themselves, to folders of the user, whose links may lead anywhere.

    Args:
        path: the file.
        uri: its address, or that of a folder that contains it: names the claim.

    Raises:
        UserError: 'OutsideClaim'.
    """
    claim = uri.removeprefix("pvc://").partition("/")[0]
    root = claim_path(f"pvc://{claim}")
    if not root.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
        raise UserError(
            "OutsideClaim",
            f"{uri}: {path.name} is a symbolic link that leads out of the claim; put the file"
            " itself there",
        )
