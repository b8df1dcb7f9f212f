"""Schema of ``HEAD.json`` and of the checkpoints that it names.

Readers trust only HEAD and the sizes and checksums that it names. Only ``claim`` moves HEAD.
"""

from __future__ import annotations

from pydantic import Field

from finetune_api.base import Record
from finetune_api.time_use import TimeUse
from finetune_trainer.failures import TrainerError
from finetune_trainer.storage.objects import FileInfo, ObjectNotFound, ObjectStore


class Checkpoint(Record):
    """One valid checkpoint."""

    attempt: int
    """Attempt that wrote it."""
    step: int
    """Completed optimizer steps."""
    uri: str
    """Prefix of the files, without a trailing '/'."""
    files: dict[str, FileInfo]
    """Size and checksum of each file (``checkpoint_files``), by name below ``uri``."""
    metric: float | None = None
    """Value of spec.checkpoint.metric; absent if not measured at this step."""
    created: float
    """Unix time in seconds."""


class PointCheckpoint(Checkpoint):
    """Weights that ``evaluation.remedy`` has chosen, between those of the base model and of a
    checkpoint. No training goes on from them: there is no optimizer state."""

    source: str
    """``uri`` of that checkpoint."""


class Rollback(Record):
    """One return of the run to an earlier checkpoint (``spec.training.guard``)."""

    attempt: int
    """Attempt that rolled back."""
    skipped: list[int]
    """Consecutive steps whose updates were skipped; their samples are left out afterwards."""
    skipped_steps: int
    """Skipped steps of the whole run up to then."""


class Head(Record):
    """``HEAD.json``."""

    run: str
    """Identity of the run."""
    attempt: int
    """Attempt that owns the run, from 1."""
    owner: str
    """Random token of the claim, by which an attempt recognizes its own HEAD."""
    revision: int = 1
    """Revision that the attempt belongs to (``RunSpec.revision``)."""
    restarts: int
    """Attempts that took over from an unreleased attempt of their own revision. A new revision
    starts from the operator's count, because the operator knows how the earlier revisions ended."""
    released: bool
    """Whether the attempt ended by itself."""
    claimed: float
    """Unix time in seconds at which the attempt took the run."""
    training_seconds: float
    """Wall time of the ended attempts."""
    time: TimeUse | None = None
    """How the attempts have spent their time, up to the newest checkpoint, or the claim or release
    of the attempt."""
    checkpoints: list[Checkpoint]
    """Newest first."""
    best: str | None = None
    """``uri`` of the checkpoint with the best metric."""
    point: PointCheckpoint | None = None
    """Weights that ``evaluation.remedy`` has chosen, if they are not those of a checkpoint."""
    rollbacks: list[Rollback] = Field(default=[])
    """All rollbacks, oldest first; ``checkpoints`` lacks the checkpoints that they removed."""

    @property
    def named(self) -> list[Checkpoint]:
        """All checkpoints that exist."""
        return [*self.checkpoints, *([self.point] if self.point else [])]

    @property
    def left_out(self) -> list[int]:
        """Skipped steps whose samples are left out of training."""
        return [step for rollback in self.rollbacks for step in rollback.skipped]


class CorruptCheckpoint(TrainerError):
    """Files of a checkpoint are missing or differ from the committed ones."""

    def __init__(self, uri: str, what: str) -> None:
        super().__init__("CorruptCheckpoint", f"{uri}: {what}; this checkpoint cannot be used")


def read_head(store: ObjectStore, run_uri: str) -> tuple[Head, str] | None:
    """Return HEAD and its ETag; None before the first attempt."""
    try:
        text, etag = store.get_tagged(f"{run_uri}/HEAD.json")
    except ObjectNotFound:
        return None
    return Head.model_validate_json(text), etag


def write_head(store: ObjectStore, run_uri: str, head: Head, etag: str | None) -> str:
    """Write HEAD if it still has that ETag (None: if it does not exist); return the new ETag.

    Raises:
        PreconditionFailed: another writer moved HEAD.
    """
    text = head.model_dump_json(by_alias=True, exclude_none=True, indent=1)
    return store.put(f"{run_uri}/HEAD.json", text.encode(), if_match=etag, if_absent=etag is None)


def checkpoint_uri(run_uri: str, attempt: int, step: int) -> str:
    """Return the prefix under which an attempt uploads the files of a checkpoint."""
    return f"{run_uri}/attempt-{attempt}/step-{step:08}"


def point_uri(run_uri: str, attempt: int, step: int) -> str:
    """Return the prefix under which an attempt uploads a point between the base model and a
    checkpoint."""
    return f"{run_uri}/attempt-{attempt}/point-{step:08}"
