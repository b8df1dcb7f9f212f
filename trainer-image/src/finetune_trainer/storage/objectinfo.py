"""What is said of objects: their addresses and sizes, whose keys ask for them, and the answers that
callers decide by. Import it from ``objects``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from finetune_trainer.failures import TrainerError, UserError


class ObjectNotFound(UserError):
    """No object of that key."""

    def __init__(self, uri: str) -> None:
        super().__init__("ObjectNotFound", f"{uri}: there is no such object; check the address")
        self.uri = uri


class PreconditionFailed(TrainerError):
    """The object is not (or no longer) what the condition of a put asked for."""

    def __init__(self, uri: str) -> None:
        super().__init__("PreconditionFailed", f"{uri}: changed by another writer")


class BeyondTheEnd(TrainerError):
    """A range that begins where the object has ended."""

    def __init__(self, uri: str) -> None:
        super().__init__("BeyondTheEnd", f"{uri}: the object is shorter than was asked for")


@dataclass(frozen=True)
class ObjectInfo:
    """What a listing says of an object."""

    uri: str
    size: int
    """In bytes."""
    etag: str


@dataclass(frozen=True)
class FileInfo:
    """What a reader checks a file by."""

    bytes: int
    sha256: str


def file_info(path: Path) -> FileInfo:
    """Size and sha256 (hexadecimal) of a local file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileInfo(path.stat().st_size, digest)


def split_uri(uri: str) -> tuple[str, str]:
    """Bucket and key of an address.

    Raises:
        UserError: where it is not ``s3://bucket/…``.
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
    """Where they came from, for messages: "Secret s3-credentials"."""
