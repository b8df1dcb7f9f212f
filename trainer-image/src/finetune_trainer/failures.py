"""Exceptions of the stages: one class per remedy, and their ``Failure`` and exit code.

A ``TrainerError`` carries the fields that the job's status shows: reason and message (with the
remedy); its exit code leads to the row of ``finetune_api.failures`` with the class. ``failure_of``
turns any exception into a ``Failure``; ``exit_code`` maps a failure to the exit code that
``podFailurePolicy`` matches.
"""

from __future__ import annotations

import errno
import traceback
from typing import ClassVar, Final

from finetune_api.base import InvalidSpec
from finetune_api.failures import BY_EXIT_CODE, ROWS
from finetune_api.names import FINAL_EXIT_CODES, ExitCode, FailureClass
from finetune_api.results import Failure
from finetune_trainer.devicefaults import device_fault, shown


class TrainerError(Exception):
    """A failure with a known cause. ``reason`` is a CamelCase word; ``message`` states what
    happened, where, and what to do."""

    exit_code: ClassVar[ExitCode] = ExitCode.INTERNAL

    def __init__(self, reason: str, message: str) -> None:
        message = printable(message)
        super().__init__(message)
        self.reason = reason
        self.message = message

    @property
    def failure_class(self) -> FailureClass:
        return BY_EXIT_CODE[self.exit_code].failure_class

    @property
    def retryable(self) -> bool:
        """Whether a new pod may succeed."""
        return self.exit_code not in FINAL_EXIT_CODES

    def __reduce__(self) -> tuple[object, ...]:
        """Support pickling, to send the error to other ranks: subclasses have other arguments."""
        return _revive, (type(self), self.reason, self.message)


def printable(text: str) -> str:
    """Escape control characters and bidirectional controls: keys and records are untrusted, and a
    terminal shows the message."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )


def _revive(kind: type[TrainerError], reason: str, message: str) -> TrainerError:
    error = kind.__new__(kind)
    TrainerError.__init__(error, reason, message)
    return error


class UserError(TrainerError):
    """The manifest requests something impossible; the user must change it."""

    exit_code = ExitCode.USER_ERROR


class DataError(TrainerError):
    """A record is unusable. The message names object, line and field."""

    exit_code = ExitCode.DATA_ERROR


class StorageDenied(TrainerError):
    """Object storage denies a request permanently: credentials, bucket, permissions."""

    exit_code = ExitCode.STORAGE_DENIED


class StorageUnavailable(TrainerError):
    """Object storage is unreachable or overloaded."""

    exit_code = ExitCode.STORAGE_UNAVAILABLE


class Diverged(TrainerError):
    """The loss is not finite or spikes, and rolling back does not help."""

    exit_code = ExitCode.DIVERGED


class OutOfMemory(TrainerError):
    """The device is out of memory: the same step would fail again."""

    exit_code = ExitCode.OUT_OF_MEMORY


class HostOutOfMemory(TrainerError):
    """The pod is out of memory. What it needs varies, e.g. while a checkpoint is saved."""

    exit_code = ExitCode.HOST_OUT_OF_MEMORY


class Fenced(TrainerError):
    """A newer attempt owns the run: this process must not write any more."""

    exit_code = ExitCode.FENCED


class NodeFailure(TrainerError):
    """A peer process, a device or a node is lost."""

    exit_code = ExitCode.NODE_FAILURE


class Interrupted(TrainerError):
    """Stopped on request. The message says whether the state is saved."""

    exit_code = ExitCode.INTERRUPTED


class Unexpected(TrainerError):
    """An error of unknown cause: it may be the node's, so it is tried again before it is final."""

    exit_code = ExitCode.UNEXPECTED


class Stalled(TrainerError):
    """A process made no progress for too long."""

    exit_code = ExitCode.STALLED


PEER_LOST: Final = "PeerLost"
"""Reason of a NodeFailure caused by another pod: this pod can restart its workers in place."""
GANG_GROWS: Final = "GangGrows"
"""Reason of an Interrupted attempt that starts again in place, with another node."""


def object_changed(uri: str) -> DataError:
    """Return the error of an input object that changed while the job ran: its old and new contents
    would be mixed in one training set."""
    return DataError(
        "ObjectChanged",
        f"{uri}: the object was added, replaced or removed while the job read its inputs; make sure"
        " that nothing writes there, then set a new spec.rerunToken",
    )


def failure_of(error: BaseException) -> Failure:
    """Return the failure that the job's status shows for an exception."""
    known = recognise(error)
    return Failure.model_validate(
        {
            "class": known.failure_class,
            "reason": known.reason,
            "message": known.message,
            "retryable": known.retryable,
        }
    )


def recognise_text(text: str) -> TrainerError | None:
    """Classify the error text of CUDA, its libraries or NCCL; None if it is unknown."""
    row = device_fault(text)
    if row is None:
        return None
    remedy = f". {row.remedy}" if row.remedy else ""
    return _revive(_exception_of(row.reason), row.reason, f"{row.what}: {shown(text)}{remedy}")


def recognise(error: BaseException) -> TrainerError:
    """Classify any exception: by its type, else by its text, since libraries raise plain
    RuntimeErrors."""
    if isinstance(error, TrainerError):
        return error
    if isinstance(error, InvalidSpec):
        return UserError("InvalidSpec", str(error))
    name = type(error).__name__
    text = str(error)
    if (known := recognise_text(text)) is not None:
        return known
    if _is_of_disk(error):
        return NodeFailure(
            "DiskFailed", f"the node's disk is full or fails: {text}; tried again, elsewhere if the"
            " pod is replaced"
        )  # fmt: skip
    lost = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "timed out",
            "Connection refused", "recvValue failed", "Timed out waiting")  # fmt: skip
    distributed = name.startswith("Dist") or "gloo" in text.lower() or "nccl" in text.lower()
    if distributed or (name == "RuntimeError" and any(mark in text for mark in lost)):
        first = text.splitlines()[0] if text else name
        return NodeFailure(PEER_LOST, f"another rank was lost: {first}")
    place = traceback.extract_tb(error.__traceback__)
    where = f" at {place[-1].filename.rsplit('/', 1)[-1]}:{place[-1].lineno}" if place else ""
    return Unexpected("Unexpected", f"{name}{where}: {text or 'no message'}")


def _is_of_disk(error: BaseException) -> bool:
    """Whether a write failed for the disk: torch reports it as a RuntimeError."""
    number = error.errno if isinstance(error, OSError) else None
    full = "No space left on device" in str(error)
    return full or number in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


_KINDS: Final[list[type[TrainerError]]] = [TrainerError, *TrainerError.__subclasses__()]
_EXCEPTIONS: Final[dict[ExitCode, type[TrainerError]]] = {kind.exit_code: kind for kind in _KINDS}
"""The exception of each exit code."""


def _exception_of(reason: str) -> type[TrainerError]:
    code = ROWS[reason].exit_code
    assert code is not None, reason
    return _EXCEPTIONS[code]


def exit_code(failure: Failure) -> ExitCode:
    """Return the exit code of a container that ends with this failure."""
    row = ROWS.get(failure.reason)
    if row is not None and row.exit_code is not None:
        return row.exit_code
    same = (
        code
        for code, row in BY_EXIT_CODE.items()
        if row.failure_class == failure.failure_class and code != ExitCode.FENCED
        if (code not in FINAL_EXIT_CODES) == failure.retryable
    )
    return ExitCode(next(same, ExitCode.INTERNAL))
