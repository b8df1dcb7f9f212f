"""Checkpoints of the training state: written by torch's distributed checkpoint, made real by HEAD.

    commit ──► copy on the host ──► (training goes on)
                    └─ thread ──► parts, several at a time ──► all ranks have? ──► HEAD moves

The training waits for the copy alone, and for the checkpoint before where that is still on its way.
A checkpoint that storage does not take is given up, and the next one tries again: storage that is
away for some minutes costs the run no steps.

Loading reads what this rank needs, verifies it, takes the newest valid checkpoint, and does not
care how many ranks wrote it.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from torch import nn

from finetune_api.run_spec import RunSpec
from finetune_trainer.engine.checkpointing.dcp import (
    load_state,
    load_weights,
    save_state,
    state_of,
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
from finetune_trainer.storage.checkpoint_files import read_file
from finetune_trainer.storage.claim import (
    Checkpoint,
    Claim,
    CorruptCheckpoint,
    Head,
    Rollback,
    checkpoint_uri,
    claim,
)
from finetune_trainer.storage.objects import FileInfo, ObjectStore
from finetune_trainer.train.state import LoopState

_DEFAULT_SECONDS: Final = 600
_STATE_FILE: Final = "state.json"
_NICE: Final = 10
MOST_FAILURES: Final = 3
"""The attempt ends with the last of so many checkpoints in a row that storage did not take; of what
is trained without one, all is lost with the node."""


class Upload:
    """A checkpoint on its way, in a thread of its own, which leaves the processor to the
    training."""

    def __init__(self, step: int, work: Callable[[], None]) -> None:
        self.step = step
        self._work = work
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint-upload", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        if sys.platform == "linux":  # where this is the thread's alone, and those that it starts
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        try:
            self._work()
        except BaseException as error:
            self._error = error

    @property
    def over(self) -> bool:
        """Whether it has ended, well or badly."""
        return not self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether it has ended badly."""
        return self.over and self._error is not None

    def wait(self) -> None:
        """Until it has ended; raises what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error


@dataclass
class CheckpointManager:
    """The checkpoints of a run as this attempt sees them, alike on all ranks; the claim that moves
    HEAD is held by the first rank alone."""

    world: World
    """For words of the thread that trains."""
    channel: World
    """For words of the thread that commits."""
    store: ObjectStore
    run_spec: RunSpec
    staging: Staging
    head: Head
    """As of the last checkpoint that has settled."""
    claim: Claim | None
    upload: Upload | None = None
    """The checkpoint on its way; at most one is."""
    abandoned: int = 0
    """Commits that this attempt went on without."""
    failures: list[StorageUnavailable] = field(default_factory=list)
    """Why those were given up that no checkpoint has followed since."""

    @classmethod
    def take(
        cls, world: World, store: ObjectStore, run_spec: RunSpec, scratch: Path
    ) -> CheckpointManager:
        """Take the run for a new attempt of this gang.

        Args:
            scratch: folder on the local disk, for the copies of spec.checkpoint.staging: Disk.

        Raises:
            StorageUnavailable: where storage does not answer.
        """
        metric = run_spec.spec.checkpoint.metric
        held: list[Claim] = []

        def claim_run() -> Head:
            held.append(
                claim(
                    store, run_spec.run_uri, run_spec.run,
                    better=partial(better, metric), keep_last=run_spec.spec.checkpoint.keep_last,
                    keep_best=run_spec.spec.checkpoint.keep_best,
                    revision=run_spec.revision, restarts=run_spec.restarts,
                )
            )  # fmt: skip
            return held[0].head

        head = world.on_main(claim_run)
        channel = world.with_own_control_group()
        staging = Staging(
            scratch if run_spec.spec.checkpoint.staging == "Disk" else None, world.control
        )
        return cls(world, channel, store, run_spec, staging, head, held[0] if held else None)

    @property
    def latest_uri(self) -> str | None:
        return self.head.checkpoints[0].uri if self.head.checkpoints else None

    @property
    def best_uri(self) -> str | None:
        return self.head.best

    def training_seconds(self) -> float:
        """Wall time of all attempts up to now."""
        return self.world.on_main(lambda: self._held.training_seconds())

    def due_by_step(self, step: int) -> bool:
        """Whether the manifest asks for a checkpoint at this step."""
        every = self.run_spec.spec.checkpoint.every_steps
        return every is not None and step % every == 0

    def due_by_time(self, seconds: float) -> bool:
        """Whether the manifest asks for a checkpoint so many seconds after the last."""
        rule = self.run_spec.spec.checkpoint
        if rule.every_steps is not None:
            return False
        return seconds >= (rule.every_seconds or _DEFAULT_SECONDS)

    def save(
        self, model: nn.Module, optimizers: Optimizers, state: LoopState, *, last: bool = False
    ) -> None:
        """Copy the state, and have the copy written and HEAD moved to it while training goes on.

        Args:
            last: nothing is trained behind it: it is tried force became of those before.

        Raises: as ``abandon_failed_upload``, of the checkpoint before.
        """
        self.abandon_failed_upload(force=last)
        copy = self.staging.copy(state_of(model, optimizers))
        loop, step = state.to_json(), state.step
        metric = state.metric_at(step, self.run_spec.spec.checkpoint.metric)
        self.upload = Upload(step, lambda: self._write(copy, loop, step, metric))

    @property
    def failed(self) -> bool:
        """Whether the checkpoint on its way has failed: ``settle`` raises why. One rank may know it
        before another."""
        return self.upload is not None and self.upload.failed

    def settled(self) -> bool:
        """Whether a checkpoint has become real since the last time this was asked."""
        over = self.upload is not None and self.upload.over and not self.upload.failed
        if over:
            self.settle()
        return over

    def settle(self) -> None:
        """Wait for the checkpoint on its way.

        Raises (on all ranks):
            Fenced: where a newer attempt has taken the run.
            StorageUnavailable: where storage does not answer.
        """
        upload, self.upload = self.upload, None
        if upload is not None:
            upload.wait()
            self.failures.clear()

    def abandon_failed_upload(self, *, force: bool = False) -> None:
        """Wait for the checkpoint on its way, and go on without it where storage did not take it:
        the one before stands, and what was written of this one is removed with the next.

        Where only the answer was lost, HEAD names it all the same. Its files are whole then, and
        the next move of HEAD finds it there and keeps it.

        Args:
            force: however many have failed before.

        Raises (on all ranks, as all share what becomes of a checkpoint):
            StorageUnavailable: where it is the last of ``MOST_FAILURES`` in a row.
            Fenced, and all that is no matter of storage that is away: as ``settle``.
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
                    f"the checkpoint of step {upload.step} is given up, and the next one tries"
                    f" again (the newest is {newest}). {error.reason}: {error.message}",
                    flush=True,
                )

    def _write(self, staged: StagedState, loop: str, step: int, metric: float | None) -> None:
        uri = checkpoint_uri(self.run_spec.run_uri, self.head.attempt, step)
        writer = CheckpointWriter(self.store, uri)
        save_state(writer, staged, self.channel.control)

        def finished() -> dict[str, FileInfo]:
            if self.world.is_main:
                writer.write(_STATE_FILE, loop.encode())
            return writer.files

        parts = self.channel.on_all(finished)
        files = {name: info for part in parts for name, info in part.items()}
        self._move(lambda held: held.commit(step, files, metric), self.channel)

    def restore(self, model: nn.Module, optimizers: Optimizers) -> LoopState | None:
        """Load the newest valid checkpoint; None where there is none. Commits that prove damaged
        are taken out of HEAD.

        Raises:
            StorageUnavailable: 'CheckpointsDamaged' where none of them was valid; another attempt
            may
                begin from the base model.
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
            return LoopState.from_json(text.decode())
        if damaged:
            raise StorageUnavailable(
                "CheckpointsDamaged",
                f"{self.run_spec.run_uri}: no checkpoint has all of its files as they were written;"
                " the next attempt begins from the base model",
            )
        return None

    def rewind(
        self, model: nn.Module, optimizers: Optimizers, rollback: Rollback
    ) -> LoopState | None:
        """Note a rollback in HEAD, with the checkpoints from behind its first skipped step out of
        it, and load the newest valid one that is left; None (and nothing has changed) where there
        is none.

        Raises: as ``abandon_failed_upload`` and ``restore``; StorageUnavailable too where there is
        none because
            storage did not take it, so that another attempt may go on.
        """
        self.abandon_failed_upload()
        if not any(checkpoint.step <= rollback.skipped[0] for checkpoint in self.head.checkpoints):
            if self.failures:
                raise self.failures[-1]
            return None
        self._move(partial(Claim.rewind, rollback=rollback))
        return self.restore(model, optimizers)

    def load_best(self, model: nn.Module, step: int) -> Checkpoint:
        """Put the weights that will be published into the model: those of the best checkpoint, or
        of the newest where no metric was measured. Returns that checkpoint.

        Raises:
            CorruptCheckpoint: where the files of all checkpoints are damaged.
        """
        self.settle()
        whole = True  # what is in the model: damage may come to light halfway
        while self.head.checkpoints:
            best = [c for c in self.head.checkpoints if c.uri == self.head.best]
            chosen = (best or self.head.checkpoints)[0]
            if whole and chosen.step == step:
                return chosen
            try:
                load_weights(self._reader(chosen), model, self.world.control)
                return chosen
            except CorruptCheckpoint as error:
                self._discard(chosen, error)
                whole = False
        raise CorruptCheckpoint(self.run_spec.run_uri, "no checkpoint of the run has its files")

    def release(self) -> None:
        """End the attempt: what follows is no restart."""
        self.settle()
        self._move(lambda held: held.release())

    @property
    def _held(self) -> Claim:
        assert self.claim is not None, "only the first rank holds the claim"
        return self.claim

    def _move(self, change: Callable[[Claim], object], world: World | None = None) -> None:
        def moved() -> Head:
            change(self._held)
            return self._held.head

        self.head = (world or self.world).on_main(moved)

    def _reader(self, checkpoint: Checkpoint) -> CheckpointReader:
        return CheckpointReader(self.store, checkpoint, self._read(checkpoint, METADATA))

    def _read(self, checkpoint: Checkpoint, name: str) -> bytes:
        """A small file of a checkpoint; read once, and alike on all ranks."""
        return self.world.on_main(partial(read_file, self.store, checkpoint, name))

    def _discard(self, checkpoint: Checkpoint, error: CorruptCheckpoint) -> None:
        if self.world.is_main:
            print(f"{error.message}; the one before is tried", flush=True)
        self._move(partial(Claim.discard, corrupt=checkpoint))
