"""Ownership of a run and its valid checkpoints: ``HEAD.json``, moved only by compare-and-swap.

    claim(…) ──► attempt n ──► files under attempt-n/step-…/ ──► commit(…) ──► … ──► release()

A checkpoint is valid once HEAD names it. An attempt that was replaced finds another owner in HEAD
and is ``Fenced``: its uploads stay under its own attempt and are ignored. Every change is
idempotent, so after a lost response HEAD is read back and the change is tried again.
"""

from __future__ import annotations

import logging
import math
import random
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cmp_to_key
from typing import Final

from finetune_api.time_use import TimeUse
from finetune_trainer.failures import Fenced, StorageUnavailable, TrainerError
from finetune_trainer.storage.heartbeat import latest_end, read_heartbeat
from finetune_trainer.storage.objects import FileInfo, ObjectStore, PreconditionFailed
from finetune_trainer.storage.run_head import (
    Checkpoint,
    CorruptCheckpoint,
    Head,
    PointCheckpoint,
    Rollback,
    checkpoint_uri,
    point_uri,
    read_head,
    write_head,
)

__all__ = [
    "Better",
    "Checkpoint",
    "Claim",
    "CorruptCheckpoint",
    "Head",
    "PointCheckpoint",
    "Rollback",
    "checkpoint_uri",
    "claim",
    "point_uri",
    "read_head",
]

Better = Callable[[float, float], bool]
"""``better(new, old)``: whether the new value of a metric improves on the old one."""

TRIES: Final = 20
"""Compare-and-swap rounds; in each failed round another writer succeeded."""
PAUSE_SECONDS: Final = 0.05
log = logging.getLogger(__name__)
_CHECKPOINT_KEY: Final = re.compile(r"/attempt-(\d+)/(?:step|point)-(\d+)/")


def claim(
    store: ObjectStore,
    run_uri: str,
    run: str,
    *,
    better: Better,
    keep_last: int,
    keep_best: int = 1,
    revision: int = 1,
    restarts: int = 0,
    account: Callable[[int, TimeUse | None], TimeUse | None] = lambda attempt, earlier: earlier,
    previous: Iterable[tuple[float | None, TimeUse | None]] = (),
    began: float | None = None,
    clock: Callable[[], float] = time.time,
) -> Claim:
    """Take the run for a new attempt and fence its previous owner.

    Args:
        better: order of the metric that selects the best checkpoint.
        keep_last: number of newest checkpoints to keep.
        keep_best: number of best checkpoints to keep in addition.
        revision: revision of the run that the attempt belongs to.
        restarts: restarts counted by the operator for earlier revisions.
        account: begins the account of time of an attempt, given that of the attempts before.
        previous: what the nodes of this gang know of the attempt before: when it ended, in Unix
            time, and its last account of the time.
        began: since when this gang has been starting, if before now; the attempt before had ended.
        clock: Unix time in seconds.

    Raises:
        TrainerError: 'HeadOfAnotherRun'.
        StorageUnavailable: storage does not respond, or other attempts win ``TRIES`` rounds.
    """
    owner = secrets.token_hex(8)
    for _ in range(TRIES):
        found = read_head(store, run_uri)
        if found is not None and found[0].owner == owner:
            return Claim(store, run_uri, *found, better, (keep_last, keep_best), clock)
        before, etag = found or (None, None)
        head = Head(
            run=run, revision=revision, attempt=1, owner=owner, restarts=restarts, released=False,
            claimed=clock(), training_seconds=0.0, checkpoints=[],
        )  # fmt: skip
        if before is not None:
            seen = read_heartbeat(store, run_uri, before.attempt)
            latest = latest_end(seen, _last_kept(before), began or head.claimed)
            ended = min((end for end, _ in previous if end is not None), default=latest)
            told = [use for _, use in previous] + [seen.use if seen else None]
            time_use = _earlier_time(before, told, ended)
            head = _next_attempt(before, head, ended).model_copy(update={"time": time_use})
        head = head.model_copy(update={"time": account(head.attempt, head.time)})
        try:
            etag = write_head(store, run_uri, head, etag)
        except (PreconditionFailed, StorageUnavailable):
            time.sleep(random.uniform(0, PAUSE_SECONDS))
            continue  # read HEAD: after a lost response this attempt may be the owner
        return Claim(store, run_uri, head, etag, better, (keep_last, keep_best), clock)
    raise _contended(run_uri)


def _next_attempt(before: Head, first: Head, ended: float) -> Head:
    """Return HEAD of the attempt after ``before``.

    Args:
        first: HEAD as if the attempt were the first of its run.
        ended: Unix time at which the previous attempt ended, if it did not release.
    """
    if before.run != first.run:
        raise TrainerError(
            "HeadOfAnotherRun",
            f"HEAD.json is of run {before.run}, not of {first.run}; nothing was changed",
        )
    lost = not before.released
    # The operator counts the restarts of earlier revisions: a final failure, or a change of the
    # spec, is no restart.
    known = max(before.restarts, first.restarts)
    return before.model_copy(
        update={
            "revision": first.revision,
            "attempt": before.attempt + 1,
            "owner": first.owner,
            "restarts": before.restarts + lost if before.revision == first.revision else known,
            "released": False,
            "claimed": first.claimed,
            "training_seconds": before.training_seconds + lost * (ended - before.claimed),
        }
    )


def _earlier_time(before: Head, told: Iterable[TimeUse | None], ended: float) -> TimeUse | None:
    """Return the account of the attempts up to ``before``, by its newest account."""
    if before.released or before.time is None:
        return before.time
    own = [use for use in told if use is not None and use.attempt == before.attempt]
    return max([before.time, *own], key=lambda use: use.until).ended(ended)


def _last_kept(head: Head) -> float:
    """Return the time up to which the work of HEAD's attempt is saved."""
    return max([head.claimed, *(c.created for c in head.checkpoints if c.attempt == head.attempt)])


class Claim:
    """One attempt's ownership of a run, made by ``claim``. Not thread-safe."""

    def __init__(
        self,
        store: ObjectStore,
        run_uri: str,
        head: Head,
        etag: str,
        better: Better,
        keep: tuple[int, int],
        clock: Callable[[], float],
    ) -> None:
        self.head = head
        self._store = store
        self._run_uri = run_uri
        self._etag = etag
        self._better = better
        self._keep_last, self._keep_best = keep
        self._clock = clock

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """Valid checkpoints, newest first. Files are verified when they are read."""
        return self.head.checkpoints

    @property
    def best(self) -> Checkpoint | None:
        """The checkpoint with the best metric."""
        return next((c for c in self.head.checkpoints if c.uri == self.head.best), None)

    def training_seconds(self) -> float:
        """Return the wall time of all attempts, including this one up to now."""
        running = 0.0 if self.head.released else max(0.0, self._clock() - self.head.claimed)
        return self.head.training_seconds + running

    def checkpoint_uri(self, step: int) -> str:
        """Return the prefix of a checkpoint's files in this attempt."""
        return checkpoint_uri(self._run_uri, self.head.attempt, step)

    def commit(
        self, step: int, files: Mapping[str, FileInfo], metric: float | None = None,
        time: TimeUse | None = None,
    ) -> Checkpoint:  # fmt: skip
        """Add uploaded files to HEAD as a checkpoint, then remove files that HEAD no longer names.

        Args:
            files: all uploaded files of the checkpoint, by name below ``checkpoint_uri(step)``.
            metric: value that selects the best checkpoint; None or non-finite: not a candidate.
            time: how the run has spent its time up to this step.

        Raises:
            Fenced: another attempt has taken the run; nothing has changed.
            StorageUnavailable: storage does not respond; HEAD may name the checkpoint.
        """
        uri = self.checkpoint_uri(step)
        if any(c.uri == uri for c in self.head.checkpoints):
            raise ValueError(f"step {step} is committed already by attempt {self.head.attempt}")
        new = Checkpoint(
            attempt=self.head.attempt,
            step=step,
            uri=uri,
            files=dict(files),
            metric=metric if metric is not None and math.isfinite(metric) else None,
            created=self._clock(),
        )
        spent = {} if time is None else {"time": time}
        self._move(
            lambda head: self._with_checkpoints(head, [new, *_without(head, uri)]).model_copy(
                update=spent
            )
        )
        self._sweep()
        return new

    def commit_point(self, source: Checkpoint, files: Mapping[str, FileInfo]) -> None:
        """Add uploaded weights to HEAD as the point between the base model and a checkpoint, in
        place of an earlier one; then remove files as ``commit`` does.

        Args:
            files: by name below ``point_uri`` of the checkpoint's step.

        Raises: as ``commit``.
        """
        point = PointCheckpoint(
            attempt=self.head.attempt,
            step=source.step,
            uri=point_uri(self._run_uri, self.head.attempt, source.step),
            files=dict(files),
            created=self._clock(),
            source=source.uri,
        )
        self._move(lambda head: head.model_copy(update={"point": point}))
        self._sweep()

    def discard(self, corrupt: Checkpoint) -> None:
        """Remove a corrupt checkpoint from HEAD, so that it is not selected as the best.

        Raises: as ``commit``.
        """
        self._move(lambda head: self._with_checkpoints(head, _without(head, corrupt.uri)))

    def rewind(self, rollback: Rollback) -> None:
        """Remove the checkpoints after the first skipped step from HEAD (later steps may write them
        again) and record the rollback, in one write: no attempt sees only one of the changes.

        Raises: as ``commit``.
        """
        before = self.head.rollbacks

        def rewound(head: Head) -> Head:
            left = [c for c in head.checkpoints if c.step <= rollback.skipped[0]]
            noted = {"rollbacks": [*before, rollback]}
            return self._with_checkpoints(head, left).model_copy(update=noted)

        self._move(rewound)

    def release(self, time: TimeUse | None = None) -> None:
        """End the attempt, so that the next one does not count as a restart. Idempotent.

        Args:
            time: how the run has spent its time.

        Raises: as ``commit``.
        """
        now = self._clock()

        def released(head: Head) -> Head:
            if head.released:
                return head
            spent = head.training_seconds + max(0.0, now - head.claimed)
            update = {"released": True, "training_seconds": spent, "time": time or head.time}
            return head.model_copy(update=update)

        self._move(released)

    # --- compare-and-swap --------------------------------------------------------------------

    def _move(self, change: Callable[[Head], Head]) -> None:
        """Apply ``change`` to HEAD. ``change`` must be idempotent: it is applied again on a
        retry."""
        for _ in range(TRIES):
            wanted = change(self.head)
            if wanted == self.head:
                return
            try:
                self._etag = write_head(self._store, self._run_uri, wanted, self._etag)
                self.head = wanted
                return
            except (PreconditionFailed, StorageUnavailable):
                self._read_back()
            time.sleep(random.uniform(0, PAUSE_SECONDS))
        raise _contended(self._run_uri)

    def _read_back(self) -> None:
        found = read_head(self._store, self._run_uri)
        if found is None or found[0].owner != self.head.owner:
            now = f"attempt {found[0].attempt} has taken the run" if found else "HEAD.json is gone"
            raise Fenced(
                "Fenced",
                f"{self._run_uri}/HEAD.json: {now}; attempt {self.head.attempt} stops and writes"
                " nothing more",
            )
        self.head, self._etag = found

    def _with_checkpoints(self, head: Head, checkpoints: list[Checkpoint]) -> Head:
        """Return HEAD with the newest and the best of these checkpoints."""
        ranked = sorted(
            (
                c for c in checkpoints if c.metric is not None
            ),  # newest first, also among equal metrics
            key=cmp_to_key(self._compare),
        )
        best = [c.uri for c in ranked[: self._keep_best]]
        kept = [c for i, c in enumerate(checkpoints) if i < self._keep_last or c.uri in best]
        return head.model_copy(update={"checkpoints": kept, "best": best[0] if best else None})

    def _compare(self, one: Checkpoint, other: Checkpoint) -> int:
        """Compare by metric; negative if ``one`` is better."""
        assert one.metric is not None and other.metric is not None
        worse = self._better(other.metric, one.metric)
        return worse - self._better(one.metric, other.metric)

    def _sweep(self) -> None:
        """Remove files of this and earlier attempts that HEAD does not name: pruned checkpoints,
        checkpoints that were never committed, and parts of unfinished uploads. A failure only
        delays the removal to the next commit."""
        named = {f"{c.uri}/{name}" for c in self.head.named for name in c.files}
        ours = [c.step for c in self.head.named if c.attempt == self.head.attempt]
        newest = (self.head.attempt, max(ours))

        def is_old(uri: str) -> bool:
            key = _CHECKPOINT_KEY.search(uri.removeprefix(self._run_uri))
            return key is not None and (int(key[1]), int(key[2])) <= newest

        attempts = f"{self._run_uri}/attempt-"
        try:
            present = [info.uri for info in self._store.list(attempts)]
            self._store.delete(uri for uri in present if uri not in named and is_old(uri))
            for uri, upload in self._store.open_parts(attempts):
                if is_old(uri):
                    self._store.drop_parts(uri, upload)
        except TrainerError as error:
            log.warning("old checkpoints stay for now: %s", error)


def _without(head: Head, uri: str) -> list[Checkpoint]:
    return [c for c in head.checkpoints if c.uri != uri]


def _contended(run_uri: str) -> StorageUnavailable:
    return StorageUnavailable(
        "HeadContended", f"{run_uri}/HEAD.json could not be moved in {TRIES} tries"
    )
