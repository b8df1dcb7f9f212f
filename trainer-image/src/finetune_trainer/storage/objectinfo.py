"""Addresses, sizes and credentials of objects, and the exceptions that callers handle. Import them
from ``objects``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from finetune_trainer.failures import TrainerError, UserError


class ObjectNotFound(UserError):
    """No object has that key."""

    def __init__(self, uri: str) -> None:
        super().__init__("ObjectNotFound", f"{uri}: there is no such object; check the address")
        self.uri = uri


class PreconditionFailed(TrainerError):
    """The object does not meet the condition of a request (If-Match, If-None-Match)."""

    def __init__(self, uri: str) -> None:
        super().__init__("PreconditionFailed", f"{uri}: changed by another writer")


class BeyondTheEnd(TrainerError):
    """The requested range starts at or beyond the end of the object."""

    def __init__(self, uri: str) -> None:
        super().__init__("BeyondTheEnd", f"{uri}: the object ends before the requested range")


@dataclass(frozen=True)
class ObjectInfo:
    """Entry of a listing."""

    uri: str
    size: int
    """In bytes."""
    etag: str


@dataclass(frozen=True)
class FileInfo:
    """Size and checksum by which a reader verifies a file."""

    bytes: int
    sha256: str


def file_info(path: Path) -> FileInfo:
    """Return size and sha256 (hexadecimal) of a local file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileInfo(path.stat().st_size, digest)


def split_uri(uri: str) -> tuple[str, str]:
    """Return bucket and key of an address.

    Raises:
        UserError: the address is not ``s3://bucket/…``.
    """
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not uri.startswith("s3://") or not bucket:
        raise UserError("InvalidAddress", f"{uri!r} is not an address of the form s3://bucket/key")
    return bucket, key


@dataclass(frozen=True)
class Credentials:
    """Static keys of one storage profile."""

    access_key: str
    secret_key: str
    session_token: str | None = None
    source: str = "the environment"
    """Origin of the keys, for messages: "Secret s3-credentials"."""
