"""The recorder of an attempt: every second of its processes belongs to one class of ``TimeUse``.

    launched ──► process starts ──► first step ──► … steps, evaluations, checkpoints … ──► end
            launch            load             step, or the class of the innermost ``of``

Steps are productive once a checkpoint has them: HEAD holds the account of the run as of its newest
checkpoint, and the next attempt goes on from there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from finetune_api.time_use import TimeUse
from finetune_trainer.background import BackgroundThread
from finetune_trainer.liveness import idle_seconds
from finetune_trainer.supervise.processes import machine_time, started_at
from finetune_trainer.supervise.worker_files import launched_at, leave_time

Activity = Literal["launch", "load", "step", "evaluation", "checkpoint", "compile", "recomputed"]


class TimeRecorder:
    """Measures what this process does. Other threads may read it."""

    def __init__(
        self, launched: float | None, started: float | None,
        now: Callable[[], float] = machine_time, unix: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        """
        Args:
            launched: since when this node has had no training processes; None: no supervisor.
            started: when this process was started; None: unknown.
            now: clock of both times, in seconds.
            unix: the same moment in Unix time.
        """
        self._now = now
        begun = now() if started is None else max(started, launched or started)
        self._offset = unix() - now()
        self._began = begun + self._offset
        self._spent: dict[Activity, float] = {"launch": begun - launched if launched else 0.0}
        self._mark = begun
        self._activity: Activity = "load"
        self._highest = 0
        """Highest step done by this attempt: after a rollback, earlier steps are done again."""
        self._compiled = 0.0
        self._lock = threading.Lock()
        self._earlier = self._account(0, 1)
        self._saved: Callable[[], TimeUse | None] = lambda: None

    @classmethod
    def of_this_process(cls) -> TimeRecorder:
        """Return the recorder of this process."""
        return cls(launched_at(), started_at())

    @property
    def launched(self) -> float:
        """Unix time since when this node has had no training processes but this one."""
        return self._began - self._spent["launch"]

    def claimed(
        self, attempt: int, processes: int, earlier: TimeUse | None,
        saved: Callable[[], TimeUse | None],
    ) -> None:  # fmt: skip
        """Begin the account of an attempt.

        Args:
            earlier: the account of the run's earlier attempts.
            saved: returns the account as of the newest checkpoint.
        """
        seconds = dict(earlier.seconds) if earlier else {}
        account = self._account(attempt, processes)
        self._earlier, self._saved = account.model_copy(update={"seconds": seconds}), saved

    @contextmanager
    def of(self, activity: Activity) -> Iterator[None]:
        """Count the time of a block as an activity of its own."""
        before = self._turn_to(activity)
        try:
            yield
        finally:
            self._turn_to(before)

    def training(self) -> None:
        """The startup is over: from here on the time is spent on steps."""
        self._turn_to("step")

    def stepped(self, number: int, compiled: float = 0.0) -> None:
        """End a step.

        Args:
            number: steps of the run done.
            compiled: seconds that this process has spent on compilation so far.
        """
        with self._lock:
            now = self._now()
            if compiled > self._compiled:
                self._count("compile", min(now, self._mark + compiled - self._compiled))
                self._compiled = compiled
            self._count("step" if number > self._highest else "recomputed", now)
            self._highest = max(self._highest, number)

    def use(self, *, saved: bool = False) -> TimeUse:
        """Return the account of the run up to now.

        Args:
            saved: count all steps as productive: they are in the checkpoint that is being saved.
        """
        with self._lock:
            self._count(self._activity, self._now())
            spent = {name: seconds * self._earlier.processes for name, seconds in
                     self._spent.items()}  # fmt: skip
            until = self._mark + self._offset
        steps = spent.pop("step", 0.0)
        known = self._saved()
        before = self._earlier.seconds.get("productive", 0.0)
        kept = known.seconds.get("productive", 0.0) - before if known and not saved else 0.0
        productive = steps if saved else min(steps, max(0.0, kept))
        found = self._earlier.adding(until, productive=productive, **spent)
        progressed = max(found.began, min(until, until - idle_seconds()))
        return found.model_copy(
            update={"progressed": progressed, "uncommitted": steps - productive}
        )

    def _account(self, attempt: int, processes: int) -> TimeUse:
        return TimeUse(
            attempt=attempt, processes=processes, began=self._began, until=self._began,
            progressed=self._began,
        )  # fmt: skip

    def _turn_to(self, activity: Activity) -> Activity:
        """Begin an activity; return the one that ends."""
        with self._lock:
            self._count(self._activity, self._now())
            before, self._activity = self._activity, activity
        return before

    def _count(self, activity: Activity, until: float) -> None:
        self._spent[activity] = self._spent.get(activity, 0.0) + until - self._mark
        self._mark = until


class TimeFile(BackgroundThread):
    """Context manager: a thread writes the account to a file for the supervisor, once a second and
    at the end."""

    def __init__(self, recorder: TimeRecorder) -> None:
        super().__init__("time-file")
        self._recorder = recorder

    def run(self) -> None:
        while not self.ended.wait(1.0):
            leave_time(self._recorder.use())

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        leave_time(self._recorder.use())
