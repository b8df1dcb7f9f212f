"""How long an attempt takes to its first optimizer step, and what with.

    launch → import → gang → data → model → restore → baseline → (compile) → step

The clock runs from the moment when the supervisor starts the node's workers. Each part begins where
the one before it ended, so the parts add up to the whole. What was said of them is the first
process's view: while it waits for another, its own part goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from finetune_api.results import Startup, StartupPart
from finetune_trainer.supervise.processes import machine_time, started_at
from finetune_trainer.supervise.worker_files import launched_at


class StartupClock:
    """The start of this process's attempt."""

    def __init__(
        self, launched: float | None, started: float | None, now: Callable[[], float] = machine_time
    ) -> None:
        """
        Args:
            launched: when the supervisor began to start the workers; None: there is none.
            started: when this process was started; None: unknown, and importing counts as launch.
            now: the clock of both.
        """
        self._now = now
        self.seconds: dict[StartupPart, float] = {}
        begun = now() if started is None else started
        self._mark = begun if launched is None else launched
        if launched is not None:
            self._count("launch", max(begun, launched))

    @classmethod
    def of_this_process(cls) -> StartupClock:
        """The clock at the end of the imports."""
        clock = cls(launched_at(), started_at())
        clock.reached("import")
        return clock

    def reached(self, part: StartupPart) -> None:
        """The end of a part, or of a piece of it: the time since the one before is its."""
        self._count(part, self._now())

    def first_step(self, from_step: int, compiling: float | None) -> Startup:
        """The end of the first step.

        Args:
            from_step: steps that the run had done before.
            compiling: seconds of it that were spent on compiling; None: nothing is compiled.
        """
        if compiling is not None:
            self._count("compile", min(self._mark + compiling, self._now()))
        self.reached("step")
        return Startup(seconds=self.seconds, from_step=from_step, first_step=time.time())

    def _count(self, part: StartupPart, until: float) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + until - self._mark
        self._mark = until
