"""``CURRENT.json`` of a destination: the model in use, which a run replaces by compare-and-swap.

    read (with etag) ──► compare on equal samples, gates ──► swap if unchanged, else again

Of two runs that end together, one swaps; the other finds the first one's model there, and is
compared with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from pydantic import Field

from finetune_api.base import Record, Word
from finetune_api.run_spec import JobIdentity
from finetune_trainer.failures import StorageUnavailable, UserError
from finetune_trainer.storage.objects import ObjectNotFound, ObjectStore, PreconditionFailed
from finetune_trainer.storage.published import Manifest

CURRENT_FILE: Final = "CURRENT.json"
TRIES: Final = 20
"""Compare-and-swap rounds; in each failed round another writer succeeded."""
_EARLIER: Final = 20
_DECISIONS: Final = 500


class UsedModel(Record):
    """A model that is or was in use."""

    run: Word
    """ID of the run that published it."""
    job: JobIdentity
    """Job that owns the run."""
    uri: str
    """Address of the model."""
    digest: str
    """sha256 of its manifest.json."""
    since: str
    """Time at which it became the current model (RFC 3339)."""


class Decision(Record):
    """A run that was compared by its test sets."""

    run: Word
    """ID of the run."""
    became_current: bool
    """Whether it became the current model."""
    time: str
    """Time of the decision (RFC 3339)."""


class CurrentFile(Record):
    """``CURRENT.json``."""

    current: UsedModel | None = None
    """The model in use."""
    earlier: list[UsedModel] = Field(default=[])
    """Models that were in use before, newest first."""
    decisions: list[Decision] = Field(default=[])
    """The last runs that were compared, newest first."""
    decided: dict[str, int] = Field(default={})
    """How often each test set has decided. A set that decides often is learned by the choice of
    runs: after many decisions, take fresh samples."""

    def has_decided(self, run: str) -> bool:
        """Whether a run was compared already."""
        return any(decision.run == run for decision in self.decisions)

    def after(self, run: str, model: UsedModel | None, sets: list[str], now: str) -> CurrentFile:
        """Return the file after a decision.

        Args:
            run: that was compared.
            model: the new current model; None: it stays.
            sets: names of the test sets that decided.
        """
        made = Decision(run=run, became_current=model is not None, time=now)
        counts = self.decided | {name: self.decided.get(name, 0) + 1 for name in sets}
        update = {"decisions": [made, *self.decisions][:_DECISIONS], "decided": counts}
        moved = self if model is None else self.moved(model)
        return moved.model_copy(update=update)

    def moved(self, model: UsedModel) -> CurrentFile:
        """Return the file with another current model."""
        before = [self.current] if self.current else []
        return self.model_copy(
            update={"current": model, "earlier": [*before, *self.earlier][:_EARLIER]}
        )

    def to_text(self) -> bytes:
        return (json.dumps(self.to_json(), sort_keys=True, indent=1) + "\n").encode()


@dataclass(frozen=True)
class Seen:
    """``CURRENT.json`` as it was read."""

    file: CurrentFile
    etag: str | None
    """None: it does not exist."""


@dataclass(frozen=True)
class CurrentPointer:
    """``CURRENT.json`` of one destination."""

    store: ObjectStore
    destination: str
    """``spec.output.destination``."""

    @property
    def uri(self) -> str:
        return f"{self.destination.rstrip('/')}/{CURRENT_FILE}"

    def read(self) -> Seen:
        """Raises:
        UserError: 'NotACurrentFile', another program wrote it.
        """
        try:
            text, etag = self.store.get_tagged(self.uri)
        except ObjectNotFound:
            return Seen(CurrentFile(), None)
        try:
            return Seen(CurrentFile.model_validate_json(text), etag)
        except ValueError:
            raise UserError(
                "NotACurrentFile",
                f"{self.uri} was not written by a run; move it away, or give another"
                " spec.output.destination",
            ) from None

    def swap(self, seen: Seen, file: CurrentFile) -> bool:
        """Replace the file, if it is still the one that was read."""
        try:
            absent = seen.etag is None
            self.store.put(self.uri, file.to_text(), if_match=seen.etag, if_absent=absent)
        except PreconditionFailed:
            return self.read().file == file  # our own write, whose answer was lost
        return True

    def change(self, change: Callable[[CurrentFile], CurrentFile]) -> CurrentFile:
        """Replace the file by a function of its content.

        Raises:
            StorageUnavailable: 'CurrentContended'; and what ``change`` raises.
        """
        for _ in range(TRIES):
            seen = self.read()
            file = change(seen.file)
            if self.swap(seen, file):
                return file
        raise contended(self.uri)


def used_model(uri: str, manifest: Manifest, text: bytes) -> UsedModel:
    """A published model as the one in use, from now on.

    Args:
        uri: its address.
        text: of its manifest.json.
    """
    digest = hashlib.sha256(text).hexdigest()
    return UsedModel(run=manifest.run, job=manifest.job, uri=uri, digest=digest, since=now())


def contended(uri: str) -> StorageUnavailable:
    return StorageUnavailable("CurrentContended", f"{uri} could not be moved in {TRIES} tries")


def now() -> str:
    """The time, as in the file."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def rolled_back(file: CurrentFile, uri: str, run: str | None, time: str) -> CurrentFile:
    """Return the file with an earlier model as the current one.

    Args:
        uri: of the file, for the message.
        run: of the earlier model; None: the one before the current.

    Raises:
        UserError: 'NoEarlierModel'.
    """
    at = next((n for n, model in enumerate(file.earlier) if run in (None, model.run)), None)
    if at is None:
        there = ", ".join(model.run for model in file.earlier) or "none"
        wanted = f"run {run}" if run else "earlier model"
        raise UserError("NoEarlierModel", f"{uri} names no {wanted}; earlier models: {there}")
    # What was in use since then was left on purpose: the way back does not lead to it again.
    chosen = file.earlier[at].model_copy(update={"since": time})
    return file.model_copy(update={"current": chosen, "earlier": file.earlier[at + 1 :]})
