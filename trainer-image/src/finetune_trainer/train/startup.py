"""Startup time of an attempt, by part: from the launch of the workers to the first optimizer step.

    launch → import → rendezvous → data → model → restore → baseline → (compile) → step

The clock starts when the supervisor starts the node's workers. Each part begins where the previous
one ended, so the parts add up to the total. The reported times are those of rank 0; waits for other
ranks count towards its current part.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from finetune_api.results import Startup, StartupPart
from finetune_trainer.supervise.processes import machine_time, started_at
from finetune_trainer.supervise.worker_files import launched_at


class StartupClock:
    """Measures the startup of this process."""

    def __init__(
        self, launched: float | None, started: float | None, now: Callable[[], float] = machine_time
    ) -> None:
        """
        Args:
            launched: when the supervisor began to start the workers; None: no supervisor.
            started: when this process was started; None: unknown, the import counts as launch.
            now: clock of both times, in seconds.
        """
        self._now = now
        self.seconds: dict[StartupPart, float] = {}
        begun = now() if started is None else started
        self._mark = begun if launched is None else launched
        if launched is not None:
            self._count("launch", max(begun, launched))

    @classmethod
    def of_this_process(cls) -> StartupClock:
        """Return the clock of this process. Call at the end of the imports."""
        clock = cls(launched_at(), started_at())
        clock.reached("import")
        return clock

    def reached(self, part: StartupPart) -> None:
        """End a part: add the time since the previous end to it. A part may end several times."""
        self._count(part, self._now())

    def first_step(self, from_step: int, compiling: float | None) -> Startup:
        """End the startup with the first step.

        Args:
            from_step: steps of the run done by earlier attempts.
            compiling: seconds of the step spent on compilation; None: compilation is off.
        """
        if compiling is not None:
            self._count("compile", min(self._mark + compiling, self._now()))
        self.reached("step")
        return Startup(seconds=self.seconds, from_step=from_step, first_step=time.time())

    def _count(self, part: StartupPart, until: float) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + until - self._mark
        self._mark = until
