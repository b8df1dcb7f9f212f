"""Checkpoint manager: checkpoints of the training state, written by torch's distributed checkpoint
and valid once HEAD names them.

    save ──► copy on the host ──► (training continues)
                    └─ thread ──► parts, several in parallel ──► all ranks done ──► HEAD moves
                                                                 ──► copy on the node's disk

Training waits only for the copy, and for the previous upload if that is still running. A checkpoint
that cannot be uploaded is abandoned and the next one is tried: an outage of storage of some minutes
costs the run no steps.

Loading takes the newest valid checkpoint; each rank reads and verifies only the data it needs, for
any number of ranks that wrote the checkpoint. After a restart in place that is the node's own copy.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import nn

from finetune_api.run_spec import RunSpec
from finetune_api.time_use import TimeUse
from finetune_trainer.engine.checkpointing.dcp import (
    load_state,
    load_weights,
    save_state,
    state_of,
    weights_of,
)
from finetune_trainer.engine.checkpointing.dcp_storage import (
    METADATA,
    CheckpointReader,
    CheckpointWriter,
)
from finetune_trainer.engine.checkpointing.staging import StagedState, Staging
from finetune_trainer.engine.optimizers import Optimizers
from finetune_trainer.engine.world import World
from finetune_trainer.evaluate.scores import better
from finetune_trainer.failures import StorageUnavailable
from finetune_trainer.liveness import progressed
from finetune_trainer.storage.checkpoint_files import read_file
from finetune_trainer.storage.claim import (
    Checkpoint,
    Claim,
    CorruptCheckpoint,
    Head,
    Rollback,
    checkpoint_uri,
    claim,
    point_uri,
)
from finetune_trainer.storage.local_copies import LocalCopies
from finetune_trainer.storage.objects import FileInfo, ObjectStore
from finetune_trainer.supervise import worker_files
from finetune_trainer.train.state import LoopState
from finetune_trainer.train.time_recorder import TimeRecorder

_DEFAULT_SECONDS: Final = 600
_STATE_FILE: Final = "state.json"
_CHOICE_FILE: Final = "choice.json"
_NICE: Final = 10
_LOOK_SECONDS: Final = 5.0
UPLOAD_SECONDS: Final = 1800.0
"""Time for which a running upload counts as progress: a rank that has sent its part waits for those
of the others, and one of these may hang. The parts that a rank sends count in any case."""
MOST_FAILURES: Final = 3
"""Consecutive failed checkpoints that end the attempt, because all training since the last
checkpoint is lost if a node fails."""


class Upload:
    """Upload of a checkpoint in a thread of low CPU priority.

    Args:
        began: when the checkpoint began, by ``time.monotonic``.
    """

    def __init__(self, step: int, work: Callable[[], None], began: float) -> None:
        self.step = step
        self.seconds = 0.0
        """Time from there to the end of the upload."""
        self._began = began
        self._work = work
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint-upload", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        if sys.platform == "linux":  # on Linux: of this thread and the threads it starts
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        try:
            self._work()
        except BaseException as error:
            self._error = error
        self.seconds = time.monotonic() - self._began

    @property
    def over(self) -> bool:
        """Whether the upload has ended, successfully or not."""
        return not self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether the upload has ended with an error."""
        return self.over and self._error is not None

    def wait(self) -> None:
        """Wait for the end of the upload, and raise its error."""
        while not self.over:
            if time.monotonic() - self._began < UPLOAD_SECONDS:
                progressed()
            self._thread.join(_LOOK_SECONDS)
        if self._error is not None:
            raise self._error


@dataclass
class CheckpointManager:
    """Checkpoints of a run in one attempt. All ranks hold the same state, except the claim, which
    moves HEAD and is held by rank 0 only."""

    world: World
    """For control messages of the training thread."""
    channel: World
    """For control messages of the upload thread."""
    store: ObjectStore
    run_spec: RunSpec
    staging: Staging
    copies: LocalCopies
    head: Head
    """HEAD as of the last completed upload."""
    claim: Claim | None
    recorder: TimeRecorder
    upload: Upload | None = None
    """The current upload; at most one exists."""
    longest_save: float = 0.0
    """Longest time of a checkpoint of this attempt, in seconds."""
    abandoned: int = 0
    """Checkpoints that this attempt has abandoned."""
    failures: list[StorageUnavailable] = field(default_factory=list)
    """Errors of failed checkpoints since the last successful one."""

    @classmethod
    def take(
        cls, world: World, store: ObjectStore, run_spec: RunSpec, scratch: Path,
        recorder: TimeRecorder | None = None,
    ) -> CheckpointManager:  # fmt: skip
        """Take the run for a new attempt of this world.

        Args:
            recorder: measures the attempt's time; None: from now on.
            scratch: folder on the local disk, for copies of checkpoints.

        Raises:
            StorageUnavailable: storage does not respond.
        """
        metric = run_spec.spec.checkpoint.metric
        held: list[Claim] = []
        recorder = recorder or TimeRecorder(None, None)
        previous = world.on_all(worker_files.previous_start)

        def account(attempt: int, earlier: TimeUse | None) -> TimeUse:
            recorder.claimed(
                attempt, world.size, earlier, lambda: held[0].head.time if held else None
            )
            return recorder.use()

        def claim_run() -> Head:
            held.append(
                claim(
                    store, run_spec.run_uri, run_spec.run,
                    better=partial(better, metric), keep_last=run_spec.spec.checkpoint.keep_last,
                    keep_best=run_spec.spec.checkpoint.keep_best,
                    revision=run_spec.revision, restarts=run_spec.restarts,
                    account=account, previous=previous, began=recorder.launched,
                )
            )  # fmt: skip
            return held[0].head

        head = world.on_main(claim_run)
        channel = world.with_own_control_group()
        staging = Staging(
            scratch if run_spec.spec.checkpoint.staging == "Disk" else None, world.control
        )
        copies = LocalCopies(scratch / "checkpoints")
        return cls(
            world,
            channel,
            store,
            run_spec,
            staging,
            copies,
            head,
            held[0] if held else None,
            recorder,
        )

    @property
    def latest_uri(self) -> str | None:
        return self.head.checkpoints[0].uri if self.head.checkpoints else None

    @property
    def best_uri(self) -> str | None:
        return self.head.best

    def training_seconds(self) -> float:
        """Return the wall time of all attempts up to now."""
        return self.world.on_main(lambda: self._held.training_seconds())

    def due_by_step(self, step: int) -> bool:
        """Whether the spec requests a checkpoint at this step."""
        every = self.run_spec.spec.checkpoint.every_steps
        return every is not None and step % every == 0

    def due_by_time(self, seconds: float) -> bool:
        """Whether the spec requests a checkpoint this many seconds after the last one."""
        rule = self.run_spec.spec.checkpoint
        if rule.every_steps is not None:
            return False
        return seconds >= (rule.every_seconds or _DEFAULT_SECONDS)

    def save(
        self, model: nn.Module, optimizers: Optimizers, state: LoopState, *, last: bool = False
    ) -> None:
        """Copy the state, then upload the copy and move HEAD while training continues.

        Args:
            last: no training follows: save the state no matter how many checkpoints have failed.

        Raises: as ``abandon_failed_upload``, for the previous checkpoint.
        """
        self.abandon_failed_upload(force=last)
        began = time.monotonic()
        spent = self.recorder.use(saved=True)
        copy = self.staging.copy(state_of(model, optimizers))
        loop, step = state.to_json(), state.step
        metric = state.metric_at(step, self.run_spec.spec.checkpoint.metric)
        work = partial(self._write, copy, loop, step, metric, spent, keep=not last)
        self.upload = Upload(step, work, began)

    @property
    def failed(self) -> bool:
        """Whether the current upload has failed; ``settle`` raises its error. Ranks may see this at
        different times."""
        return self.upload is not None and self.upload.failed

    def settled(self) -> bool:
        """Whether a checkpoint has become valid since the last call."""
        over = self.upload is not None and self.upload.over and not self.upload.failed
        if over:
            self.settle()
        return over

    def settle(self) -> None:
        """Wait for the current upload.

        Raises (on all ranks):
            Fenced: a newer attempt has taken the run.
            StorageUnavailable: storage does not respond.
        """
        upload, self.upload = self.upload, None
        if upload is not None:
            with self.recorder.of("checkpoint"):
                upload.wait()
            self.failures.clear()
            self.longest_save = max(self.longest_save, upload.seconds)

    def abandon_failed_upload(self, *, force: bool = False) -> None:
        """Wait for the current upload; if storage was unavailable, abandon the checkpoint. The
        previous checkpoint stays valid, and the next checkpoint removes the files of this one.

        If only the response of storage was lost, HEAD names the checkpoint nevertheless. Its files
        are complete in this case, and the next move of HEAD keeps it.

        Args:
            force: abandon the checkpoint no matter how many have failed before.

        Raises (on all ranks, because the ranks share the result of an upload):
            StorageUnavailable: ``MOST_FAILURES`` consecutive checkpoints have failed.
            Fenced, and all errors other than unavailable storage: as ``settle``.
        """
        upload = self.upload
        if upload is None:
            return
        try:
            self.settle()
        except StorageUnavailable as error:
            self.failures.append(error)
            if len(self.failures) >= MOST_FAILURES and not force:
                raise
            self.abandoned += 1
            if self.world.is_main:
                newest = (
                    f"of step {self.head.checkpoints[0].step}"
                    if self.head.checkpoints
                    else "none yet"
                )
                print(
                    f"the checkpoint of step {upload.step} is abandoned, and the next one is tried"
                    f" (the newest is {newest}). {error.reason}: {error.message}",
                    flush=True,
                )

    def _write(
        self, staged: StagedState, loop: str, step: int, metric: float | None, spent: TimeUse,
        *, keep: bool,
    ) -> None:  # fmt: skip
        """Upload a staged state, move HEAD, and ``keep`` a copy on this node."""
        uri = checkpoint_uri(self.run_spec.run_uri, self.head.attempt, step)
        writer = CheckpointWriter(self.store, uri)
        files = _upload(writer, staged, {_STATE_FILE: loop}, self.channel)
        self._move(lambda held: held.commit(step, files, metric, spent), self.channel)
        worker_files.note_commit()
        if keep:  # after the commit: the copy of the checkpoint before is of no use any more
            self.copies.keep(uri, writer.content)

    def save_point(self, model: nn.Module, source: Checkpoint, choice: str) -> Checkpoint:
        """Write the model's weights, a point between the base model and a checkpoint, and return
        what HEAD names then.

        Args:
            choice: how the point was chosen; ``load_point`` returns it.

        Raises: as ``settle``.
        """
        uri = point_uri(self.run_spec.run_uri, self.head.attempt, source.step)
        staged = self.staging.copy(weights_of(model))
        writer = CheckpointWriter(self.store, uri)
        files = _upload(writer, staged, {_CHOICE_FILE: choice}, self.world)
        self._move(lambda held: held.commit_point(source, files))
        worker_files.note_commit()
        assert self.head.point is not None, "just committed"
        return self.head.point

    def load_point(self, model: nn.Module, source: Checkpoint) -> tuple[Checkpoint, str] | None:
        """Load the point between the base model and a checkpoint that an earlier attempt has
        written, and return it with its choice. None: there is none, or it is damaged; the model may
        then be partly loaded."""
        point = self.head.point
        if point is None or point.source != source.uri:
            return None
        try:
            choice = self._read(point, _CHOICE_FILE)
            load_weights(self._reader(point), model, self.world.control)
        except CorruptCheckpoint as error:
            if self.world.is_main:
                print(f"{error.message}; it is chosen again", flush=True)
            return None
        return point, choice.decode()

    def load(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        """Load the weights of a checkpoint.

        Raises:
            CorruptCheckpoint: its files are damaged.
        """
        load_weights(self._reader(checkpoint), model, self.world.control)

    def restore(self, model: nn.Module, optimizers: Optimizers) -> LoopState | None:
        """Load the newest valid checkpoint; return None if no checkpoint exists. Damaged
        checkpoints are removed from HEAD.

        Raises:
            StorageUnavailable: 'CheckpointsDamaged' if all checkpoints are damaged; another attempt
                may start from the base model.
        """
        damaged = False
        while self.head.checkpoints:
            checkpoint = self.head.checkpoints[0]
            try:
                text = self._read(checkpoint, _STATE_FILE)
                load_state(self._reader(checkpoint), model, optimizers, self.world.control)
            except CorruptCheckpoint as error:
                self._discard(checkpoint, error)
                damaged = True
                continue
            self._report_reads(checkpoint)
            return LoopState.from_json(text.decode())
        if damaged:
            raise StorageUnavailable(
                "CheckpointsDamaged",
                f"{self.run_spec.run_uri}: the files of all checkpoints are damaged; the next"
                " attempt starts from the base model",
            )
        return None

    def _report_reads(self, checkpoint: Checkpoint) -> None:
        """Log where the bytes of a checkpoint came from; a collective."""
        read, missed = self.world.sum(torch.tensor([self.copies.read, self.copies.missed])).tolist()
        if self.world.is_main:
            print(
                f"restored step {checkpoint.step}: {read:,} bytes from the nodes' own copies,"
                f" {missed:,} from storage",
                flush=True,
            )

    def rewind(
        self, model: nn.Module, optimizers: Optimizers, rollback: Rollback
    ) -> LoopState | None:
        """Record a rollback in HEAD, remove the checkpoints after its first skipped step, and load
        the newest valid checkpoint that is left. Return None, without any change, if no checkpoint
        would be left.

        Raises: as ``abandon_failed_upload`` and ``restore``; also StorageUnavailable if no
            checkpoint would be left because uploads have failed, so that another attempt may
            continue.
        """
        self.abandon_failed_upload()
        if not any(checkpoint.step <= rollback.skipped[0] for checkpoint in self.head.checkpoints):
            if self.failures:
                raise self.failures[-1]
            return None
        self._move(partial(Claim.rewind, rollback=rollback))
        return self.restore(model, optimizers)

    def load_best(self, model: nn.Module, step: int) -> Checkpoint:
        """Load the weights to publish into the model: those of the best checkpoint, or of the
        newest if no metric was measured. Return that checkpoint.

        Args:
            step: step of the weights that the model holds now; they are not loaded again.

        Raises:
            CorruptCheckpoint: the files of all checkpoints are damaged.
        """
        self.settle()
        whole = True  # False once a load has failed, possibly after it changed some weights
        while self.head.checkpoints:
            best = [c for c in self.head.checkpoints if c.uri == self.head.best]
            chosen = (best or self.head.checkpoints)[0]
            if whole and chosen.step == step:
                return chosen
            try:
                self.load(model, chosen)
                return chosen
            except CorruptCheckpoint as error:
                self._discard(chosen, error)
                whole = False
        raise CorruptCheckpoint(self.run_spec.run_uri, "all checkpoints of the run are damaged")

    def release(self) -> None:
        """End the attempt, so that the next one does not count as a restart."""
        self.settle()
        self._move(lambda held: held.release(self.recorder.use(saved=True)))

    @property
    def _held(self) -> Claim:
        assert self.claim is not None, "only rank 0 holds the claim"
        return self.claim

    def _move(self, change: Callable[[Claim], object], world: World | None = None) -> None:
        def moved() -> Head:
            change(self._held)
            return self._held.head

        self.head = (world or self.world).on_main(moved)

    def _reader(self, checkpoint: Checkpoint) -> CheckpointReader:
        metadata = self._read(checkpoint, METADATA)
        return CheckpointReader(self.store, checkpoint, metadata, self.copies)

    def _read(self, checkpoint: Checkpoint, name: str) -> bytes:
        """Read a small file of a checkpoint on rank 0 and return it on all ranks."""
        return self.world.on_main(partial(read_file, self.store, checkpoint, name, self.copies))

    def _discard(self, checkpoint: Checkpoint, error: CorruptCheckpoint) -> None:
        if self.world.is_main:
            print(f"{error.message}; the previous checkpoint is tried", flush=True)
        self._move(partial(Claim.discard, corrupt=checkpoint))


def _upload(
    writer: CheckpointWriter, staged: StagedState, texts: Mapping[str, str], world: World
) -> dict[str, FileInfo]:
    """Write a staged state, on rank 0 with small files beside it; return all files of all ranks."""
    save_state(writer, staged, world.control)

    def finished() -> dict[str, FileInfo]:
        for name, text in texts.items() if world.is_main else ():
            writer.write(name, text.encode())
        return writer.files

    parts = world.on_all(finished)
    return {name: info for part in parts for name, info in part.items()}
