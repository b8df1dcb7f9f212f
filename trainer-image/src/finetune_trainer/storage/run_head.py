"""``HEAD.json`` and the checkpoints that it names: their form.

Readers trust HEAD, and the sizes and checksums it leads to, and nothing else. ``head`` alone
moves it.
"""

from __future__ import annotations

from pydantic import Field

from finetune_api.base import Record
from finetune_trainer.failures import TrainerError
from finetune_trainer.storage.objects import FileInfo, ObjectNotFound, ObjectStore


class Checkpoint(Record):
    """One checkpoint that is real."""

    attempt: int
    """Attempt that wrote it."""
    step: int
    """Optimizer steps done."""
    uri: str
    """Prefix of its files, without a '/' at the end."""
    files: dict[str, FileInfo]
    """What a reader checks each file by (``checkpoint_files``); by name below ``uri``."""
    metric: float | None = None
    """Value of spec.checkpoint.metric; absent where it was not measured at this step."""
    created: float
    """Unix time."""


class Rollback(Record):
    """One time that the run went back to an earlier checkpoint (``spec.training.guard``)."""

    attempt: int
    """Attempt that went back."""
    skipped: list[int]
    """The steps in a row whose updates were not made; their samples are left out since."""
    skipped_steps: int
    """All steps of the run whose updates were not made, up to then."""


class Head(Record):
    """``HEAD.json``."""

    run: str
    """Identity of the run."""
    attempt: int
    """Attempt that owns the run, from 1."""
    owner: str
    """Random word of the claim, by which a writer knows its own."""
    revision: int = 1
    """Gang that the attempt is of (``RunSpec.revision``)."""
    restarts: int
    """Attempts that took over from one of their own gang that had not released. A gang that
    replaces another begins with the operator's count: how that one ended is known there."""
    released: bool
    """Whether the attempt has ended by itself."""
    claimed: float
    """Unix time at which the attempt took the run."""
    training_seconds: float
    """Wall time of the attempts that have ended."""
    lost_seconds: float
    """Of it, what was lost: from the last checkpoint of an attempt that did not release to its end,
    as far as that is known (``seen``)."""
    checkpoints: list[Checkpoint]
    """Newest first."""
    best: str | None = None
    """``uri`` of the checkpoint with the best metric."""
    rollbacks: list[Rollback] = Field(default=[])
    """Each time that the run went back, oldest first; the checkpoints are those that are left of
    it."""

    @property
    def left_out(self) -> list[int]:
        """Steps whose samples are left out of all steps."""
        return [step for rollback in self.rollbacks for step in rollback.skipped]


class CorruptCheckpoint(TrainerError):
    """Files of a checkpoint are missing or are not what was committed."""

    def __init__(self, uri: str, what: str) -> None:
        super().__init__("CorruptCheckpoint", f"{uri}: {what}; this checkpoint cannot be used")


def read_head(store: ObjectStore, run_uri: str) -> tuple[Head, str] | None:
    """HEAD and its ETag, or None where no attempt has begun."""
    try:
        text, etag = store.get_tagged(f"{run_uri}/HEAD.json")
    except ObjectNotFound:
        return None
    return Head.model_validate_json(text), etag


def write_head(store: ObjectStore, run_uri: str, head: Head, etag: str | None) -> str:
    """Writes HEAD where it still has that ETag (None: where there is none); its new ETag.

    Raises:
        PreconditionFailed: where it has been moved.
    """
    text = head.model_dump_json(by_alias=True, exclude_none=True, indent=1)
    return store.put(f"{run_uri}/HEAD.json", text.encode(), if_match=etag, if_absent=etag is None)


def checkpoint_uri(run_uri: str, attempt: int, step: int) -> str:
    """Prefix under which an attempt uploads the files of a checkpoint."""
    return f"{run_uri}/attempt-{attempt}/step-{step:08}"
