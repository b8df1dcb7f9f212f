"""Commits of the training state: written by torch's distributed checkpoint, made real by HEAD.

    commit ──► copy on the host ──► (training goes on)
                    └─ thread ──► parts, several at a time ──► all ranks have? ──► HEAD moves

The training waits for the copy alone, and for the commit before where that is still on its way.
A commit that storage does not take is given up, and the next one tries again: storage that is away
for some minutes costs the run no steps.

Loading reads what this rank needs, verifies it, takes the newest valid commit, and does not care
how many ranks wrote it.
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

from finetune_api.order import RunOrder
from finetune_trainer.engine.commits.commitstore import METADATA, CommitReader, CommitWriter
from finetune_trainer.engine.commits.dcp import (
    load_state,
    load_weights,
    save_state,
    state_of,
)
from finetune_trainer.engine.commits.staging import StagedState, Staging
from finetune_trainer.engine.gang import Gang
from finetune_trainer.engine.optimizers import Optimizers
from finetune_trainer.evaluate.scores import better
from finetune_trainer.failures import StorageUnavailable
from finetune_trainer.storage.commitfiles import read_file
from finetune_trainer.storage.head import (
    Claim,
    Commit,
    CorruptCommit,
    Head,
    Rollback,
    claim,
    commit_uri,
)
from finetune_trainer.storage.objects import FileInfo, ObjectStore
from finetune_trainer.train.state import LoopState

_DEFAULT_SECONDS: Final = 600
_STATE_FILE: Final = "state.json"
_NICE: Final = 10
MOST_FAILURES: Final = 3
"""The attempt ends with the last of so many commits in a row that storage did not take; of what
is trained without one, all is lost with the node."""


class Upload:
    """A commit on its way, in a thread of its own, which leaves the processor to the training."""

    def __init__(self, step: int, work: Callable[[], None]) -> None:
        self.step = step
        self._work = work
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="commit", daemon=True)
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
class Checkpoints:
    """The commits of a run as this attempt sees them, alike on all ranks; the claim that moves
    HEAD is held by the first rank alone."""

    gang: Gang
    """For words of the thread that trains."""
    channel: Gang
    """For words of the thread that commits."""
    store: ObjectStore
    order: RunOrder
    staging: Staging
    head: Head
    """As of the last commit that has settled."""
    claim: Claim | None
    upload: Upload | None = None
    """The commit on its way; at most one is."""
    given_up: int = 0
    """Commits that this attempt went on without."""
    failures: list[StorageUnavailable] = field(default_factory=list)
    """Why those were given up that no commit has followed since."""

    @classmethod
    def take(cls, gang: Gang, store: ObjectStore, order: RunOrder, scratch: Path) -> Checkpoints:
        """Take the run for a new attempt of this gang.

        Args:
            scratch: folder on the local disk, for the copies of spec.checkpoint.staging: Disk.

        Raises:
            StorageUnavailable: where storage does not answer.
        """
        metric = order.spec.checkpoint.metric
        held: list[Claim] = []

        def claim_run() -> Head:
            held.append(
                claim(
                    store, order.run_uri, order.run,
                    better=partial(better, metric), keep_last=order.spec.checkpoint.keep_last,
                    keep_best=order.spec.checkpoint.keep_best,
                    revision=order.revision, restarts=order.restarts,
                )
            )  # fmt: skip
            return held[0].head

        head = gang.from_first(claim_run)
        channel = gang.on_a_channel_of_its_own()
        staging = Staging(
            scratch if order.spec.checkpoint.staging == "Disk" else None, gang.control
        )
        return cls(gang, channel, store, order, staging, head, held[0] if held else None)

    @property
    def latest_uri(self) -> str | None:
        return self.head.commits[0].uri if self.head.commits else None

    @property
    def best_uri(self) -> str | None:
        return self.head.best

    def training_seconds(self) -> float:
        """Wall time of all attempts up to now."""
        return self.gang.from_first(lambda: self._held.training_seconds())

    def due_by_step(self, step: int) -> bool:
        """Whether the manifest asks for a commit at this step."""
        every = self.order.spec.checkpoint.every_steps
        return every is not None and step % every == 0

    def due_by_time(self, seconds: float) -> bool:
        """Whether the manifest asks for a commit so many seconds after the last."""
        rule = self.order.spec.checkpoint
        if rule.every_steps is not None:
            return False
        return seconds >= (rule.every_seconds or _DEFAULT_SECONDS)

    def commit(
        self, model: nn.Module, optimizers: Optimizers, state: LoopState, *, last: bool = False
    ) -> None:
        """Copy the state, and have the copy written and HEAD moved to it while training goes on.

        Args:
            last: nothing is trained behind it: it is tried whatever became of those before.

        Raises: as ``let_go``, of the commit before.
        """
        self.let_go(whatever=last)
        copy = self.staging.copy(state_of(model, optimizers))
        loop, step = state.to_json(), state.step
        metric = state.metric_at(step, self.order.spec.checkpoint.metric)
        self.upload = Upload(step, lambda: self._write(copy, loop, step, metric))

    @property
    def failed(self) -> bool:
        """Whether the commit on its way has failed: ``settle`` raises why. One rank may know it
        before another."""
        return self.upload is not None and self.upload.failed

    def settled(self) -> bool:
        """Whether a commit has become real since the last time this was asked."""
        over = self.upload is not None and self.upload.over and not self.upload.failed
        if over:
            self.settle()
        return over

    def settle(self) -> None:
        """Wait for the commit on its way.

        Raises (on all ranks):
            Fenced: where a newer attempt has taken the run.
            StorageUnavailable: where storage does not answer.
        """
        upload, self.upload = self.upload, None
        if upload is not None:
            upload.wait()
            self.failures.clear()

    def let_go(self, *, whatever: bool = False) -> None:
        """Wait for the commit on its way, and go on without it where storage did not take it: the
        one before stands, and what was written of this one is removed with the next.

        Where only the answer was lost, HEAD names it all the same. Its files are whole then, and
        the next move of HEAD finds it there and keeps it.

        Args:
            whatever: however many have failed before.

        Raises (on all ranks, as all share what becomes of a commit):
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
            if len(self.failures) >= MOST_FAILURES and not whatever:
                raise
            self.given_up += 1
            if self.gang.first:
                newest = f"of step {self.head.commits[0].step}" if self.head.commits else "none yet"
                print(
                    f"the commit of step {upload.step} is given up, and the next one tries again"
                    f" (the newest is {newest}). {error.reason}: {error.message}",
                    flush=True,
                )

    def _write(self, staged: StagedState, loop: str, step: int, metric: float | None) -> None:
        uri = commit_uri(self.order.run_uri, self.head.attempt, step)
        writer = CommitWriter(self.store, uri)
        save_state(writer, staged, self.channel.control)

        def finished() -> dict[str, FileInfo]:
            if self.gang.first:
                writer.write(_STATE_FILE, loop.encode())
            return writer.files

        parts = self.channel.together(finished)
        files = {name: info for part in parts for name, info in part.items()}
        self._move(lambda held: held.commit(step, files, metric), self.channel)

    def restore(self, model: nn.Module, optimizers: Optimizers) -> LoopState | None:
        """Load the newest valid commit; None where there is none. Commits that prove damaged are
        taken out of HEAD.

        Raises:
            StorageUnavailable: 'CommitsDamaged' where none of them was valid; another attempt may
                begin from the base model.
        """
        damaged = False
        while self.head.commits:
            commit = self.head.commits[0]
            try:
                text = self._read(commit, _STATE_FILE)
                load_state(self._reader(commit), model, optimizers, self.gang.control)
            except CorruptCommit as error:
                self._discard(commit, error)
                damaged = True
                continue
            return LoopState.from_json(text.decode())
        if damaged:
            raise StorageUnavailable(
                "CommitsDamaged",
                f"{self.order.run_uri}: no commit has all of its files as they were written; the"
                " next attempt begins from the base model",
            )
        return None

    def rewind(
        self, model: nn.Module, optimizers: Optimizers, rollback: Rollback
    ) -> LoopState | None:
        """Note a rollback in HEAD, with the commits from behind its first skipped step out of it,
        and load the newest valid one that is left; None (and nothing has changed) where there is
        none.

        Raises: as ``let_go`` and ``restore``; StorageUnavailable too where there is none because
            storage did not take it, so that another attempt may go on.
        """
        self.let_go()
        if not any(commit.step <= rollback.skipped[0] for commit in self.head.commits):
            if self.failures:
                raise self.failures[-1]
            return None
        self._move(partial(Claim.rewind, rollback=rollback))
        return self.restore(model, optimizers)

    def load_best(self, model: nn.Module, step: int) -> Commit:
        """Put the weights that will be published into the model: those of the best commit, or of
        the newest where no metric was measured. Returns that commit.

        Raises:
            CorruptCommit: where the files of all commits are damaged.
        """
        self.settle()
        whole = True  # what is in the model: damage may come to light halfway
        while self.head.commits:
            best = [c for c in self.head.commits if c.uri == self.head.best]
            chosen = (best or self.head.commits)[0]
            if whole and chosen.step == step:
                return chosen
            try:
                load_weights(self._reader(chosen), model, self.gang.control)
                return chosen
            except CorruptCommit as error:
                self._discard(chosen, error)
                whole = False
        raise CorruptCommit(self.order.run_uri, "no commit of the run has its files")

    def release(self) -> None:
        """End the attempt: what follows is no restart."""
        self.settle()
        self._move(lambda held: held.release())

    @property
    def _held(self) -> Claim:
        assert self.claim is not None, "only the first rank holds the claim"
        return self.claim

    def _move(self, change: Callable[[Claim], object], gang: Gang | None = None) -> None:
        def moved() -> Head:
            change(self._held)
            return self._held.head

        self.head = (gang or self.gang).from_first(moved)

    def _reader(self, commit: Commit) -> CommitReader:
        return CommitReader(self.store, commit, self._read(commit, METADATA))

    def _read(self, commit: Commit, name: str) -> bytes:
        """A small file of a commit; read once, and alike on all ranks."""
        return self.gang.from_first(partial(read_file, self.store, commit, name))

    def _discard(self, commit: Commit, error: CorruptCommit) -> None:
        if self.gang.first:
            print(f"{error.message}; the one before is tried", flush=True)
        self._move(partial(Claim.discard, corrupt=commit))
