"""Every way in which a stage can end badly: one exception per remedy, each with its verdict.

A ``TrainerError`` carries what status shows: class, reason, message (with the remedy in it) and
whether another try can mend it. ``verdict`` turns any exception into such a ``Failure``; the exit
code that ``podFailurePolicy`` matches follows from it.
"""

from __future__ import annotations

import traceback
from typing import ClassVar, Final

from finetune_api.base import InvalidSpec
from finetune_api.names import ExitCode, FailureClass
from finetune_api.results import Failure
from finetune_trainer.devicefaults import Kind, device_fault, shown


class TrainerError(Exception):
    """A failure whose cause is known. ``reason`` is a CamelCase word, ``message`` names what
    happened, where, and what to do."""

    failure_class: ClassVar[FailureClass] = "Internal"
    exit_code: ClassVar[ExitCode] = ExitCode.INTERNAL
    retryable: ClassVar[bool] = False

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message

    def __reduce__(self) -> tuple[object, ...]:
        """Other processes are told of it: subclasses have arguments of their own."""
        return _revive, (type(self), self.reason, self.message)


def _revive(kind: type[TrainerError], reason: str, message: str) -> TrainerError:
    error = kind.__new__(kind)
    TrainerError.__init__(error, reason, message)
    return error


class UserError(TrainerError):
    """The manifest asks for what cannot be: mended by changing the manifest."""

    failure_class = "UserError"
    exit_code = ExitCode.USER_ERROR


class DataError(TrainerError):
    """A record cannot be used: the message names object, line and field."""

    failure_class = "DataError"
    exit_code = ExitCode.DATA_ERROR


class StorageDenied(TrainerError):
    """Object storage refuses, and will refuse again: credentials, bucket, permissions."""

    failure_class = "Storage"
    exit_code = ExitCode.STORAGE_DENIED


class StorageUnavailable(TrainerError):
    """Object storage cannot be reached or is overloaded."""

    failure_class = "Storage"
    exit_code = ExitCode.STORAGE_UNAVAILABLE
    retryable = True


class Diverged(TrainerError):
    """The loss is no longer a finite number, or leaps, and going back does not help."""

    failure_class = "Diverged"
    exit_code = ExitCode.DIVERGED


class OutOfMemory(TrainerError):
    """The device's memory does not suffice."""

    failure_class = "OutOfMemory"
    exit_code = ExitCode.OUT_OF_MEMORY


class Fenced(TrainerError):
    """A newer attempt has taken the run: this process must write nothing more."""

    failure_class = "Internal"
    exit_code = ExitCode.FENCED


class NodeFailure(TrainerError):
    """Another process of the gang is gone, or a device is."""

    failure_class = "NodeFailure"
    exit_code = ExitCode.NODE_FAILURE
    retryable = True


class Interrupted(TrainerError):
    """Stopped on request, with the state saved."""

    failure_class = "Preempted"
    exit_code = ExitCode.INTERRUPTED
    retryable = True


PEER_LOST: Final = "PeerLost"
"""Reason of a NodeFailure whose cause is another pod: this pod may go on in place."""


def object_changed(uri: str) -> DataError:
    """The error of an object that changes under a job: what it was and what it is now would be
    trained as one."""
    return DataError(
        "ObjectChanged",
        f"{uri}: the object was added, replaced or removed while the job read its inputs; make sure"
        " that nothing writes there, then set a new spec.rerunToken",
    )


def failure_of(error: BaseException) -> Failure:
    """What status says of an exception."""
    known = recognise(error)
    return Failure.model_validate(
        {
            "class": known.failure_class,
            "reason": known.reason,
            "message": known.message,
            "retryable": known.retryable,
        }
    )


_KINDS: Final[dict[Kind, type[TrainerError]]] = {
    "OutOfMemory": OutOfMemory,
    "NodeFailure": NodeFailure,
    "PeerLost": NodeFailure,
    "UserError": UserError,
    "Internal": TrainerError,
}


def recognise_text(text: str) -> TrainerError | None:
    """The known failure behind what CUDA, a library over it, or NCCL says; None: not known."""
    row = device_fault(text)
    if row is None:
        return None
    remedy = f". {row.remedy}" if row.remedy else ""
    return _KINDS[row.kind](row.reason, f"{row.what}: {shown(text)}{remedy}")


def recognise(error: BaseException) -> TrainerError:
    """The known failure behind an exception, told by type first and by text where libraries
    raise nothing better."""
    if isinstance(error, TrainerError):
        return error
    if isinstance(error, InvalidSpec):
        return UserError("InvalidSpec", str(error))
    name = type(error).__name__
    text = str(error)
    if (known := recognise_text(text)) is not None:
        return known
    lost = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "timed out",
            "Connection refused", "recvValue failed", "Timed out waiting")  # fmt: skip
    distributed = name.startswith("Dist") or "gloo" in text.lower() or "nccl" in text.lower()
    if distributed or (name == "RuntimeError" and any(mark in text for mark in lost)):
        first = text.splitlines()[0] if text else name
        return NodeFailure(PEER_LOST, f"another process of the gang is gone: {first}")
    place = traceback.extract_tb(error.__traceback__)
    where = f" at {place[-1].filename.rsplit('/', 1)[-1]}:{place[-1].lineno}" if place else ""
    return TrainerError("Unexpected", f"{name}{where}: {text or 'no message'}")


EXIT_CODES: Final[dict[tuple[FailureClass, bool], ExitCode]] = {
    (kind.failure_class, kind.retryable): kind.exit_code
    for kind in (
        TrainerError, UserError, DataError, StorageDenied, StorageUnavailable, Diverged,
        OutOfMemory, NodeFailure, Interrupted,
    )
}  # fmt: skip


def exit_code(failure: Failure) -> ExitCode:
    """Exit code of a container that ends with this failure."""
    if failure.reason == "Fenced":
        return ExitCode.FENCED
    return EXIT_CODES.get((failure.failure_class, failure.retryable), ExitCode.INTERNAL)
