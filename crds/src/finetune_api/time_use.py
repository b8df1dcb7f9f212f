"""How the training processes of a run spend their time: every second in exactly one class."""

from __future__ import annotations

from typing import Annotated, Final, Literal, get_args

from pydantic import Field

from finetune_api.base import Record

TimeClass = Literal[
    "launch", "load", "compile", "productive", "evaluation", "checkpoint", "recomputed", "hang",
    "teardown",
]  # fmt: skip
"""Classes that the trainer can tell apart. ``status.usage.gpuSecondsByClass`` has their meanings;
in its place of ``launch`` (from the end of the processes before, or the start of the container, to
the start of the processes) it has what the pods' own times say."""
TIME_CLASSES: Final[tuple[TimeClass, ...]] = get_args(TimeClass)

HANG_SECONDS: Final = 90.0
"""Time without a sign of progress before the end of an attempt from which on that time counts as a
hang, and no longer as part of a step. More than the minute by which the end of a killed process is
known."""

UnixTime = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
ProcessSeconds = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]


class TimeUse(Record):
    """Time of the training processes of all attempts of a run, as rank 0 measured it, in
    process-seconds: seconds times processes."""

    attempt: Annotated[int, Field(ge=0, le=2**53)]
    """The attempt at work."""
    processes: Annotated[int, Field(ge=1, le=2**20)]
    """Its processes."""
    began: UnixTime
    """When they were started; Unix time, as the other times."""
    until: UnixTime
    """The time up to which the classes account for all seconds."""
    progressed: UnixTime
    """The last sign of progress."""
    seconds: dict[TimeClass, ProcessSeconds] = Field(default={})
    """By class; steps are productive once a checkpoint has them."""
    uncommitted: ProcessSeconds = 0.0
    """Steps since the last checkpoint: not yet in a class."""

    @property
    def total(self) -> float:
        """Process-seconds of all classes."""
        return sum(self.seconds.values()) + self.uncommitted

    @property
    def goodput(self) -> float:
        """Productive share of the time, from 0 to 1."""
        return self.seconds.get("productive", 0.0) / self.total if self.total else 0.0

    @property
    def text(self) -> str:
        """Readable form, the largest class first: ``productive 81 %, load 12 %, …``."""
        named: list[tuple[str, float]] = [*self.seconds.items(), ("uncommitted", self.uncommitted)]
        by_size = sorted(named, key=lambda item: -item[1])
        shares = [(name, 100 * spent / (self.total or 1.0)) for name, spent in by_size]
        return ", ".join(f"{name} {share:.0f} %" for name, share in shares if share >= 0.5)

    def adding(self, until: float, **spent: float) -> TimeUse:
        """Return the account with more process-seconds by class."""
        seconds: dict[TimeClass, float] = self.seconds.copy()
        for name in TIME_CLASSES:
            if spent.get(name, 0.0) > 0:
                seconds[name] = seconds.get(name, 0.0) + spent[name]
        return self.model_copy(update={"seconds": seconds, "until": max(self.until, until)})

    def ended(self, at: float) -> TimeUse:
        """Return the account of an attempt that was lost at a time: what it did since its last
        checkpoint is done again, and the time without a sign of progress was a hang."""
        unknown = max(0.0, at - self.until) * self.processes
        stood = max(0.0, at - self.progressed)
        hang = 0.0
        if stood > HANG_SECONDS:
            hang = min(stood * self.processes, self.uncommitted + unknown)
        lost = self.uncommitted + unknown - hang
        return self.model_copy(update={"uncommitted": 0.0}).adding(at, recomputed=lost, hang=hang)

    def torn_down(self, at: float) -> TimeUse:
        """Return the account of a finished attempt whose processes ended at a time."""
        return self.adding(at, teardown=(at - self.until) * self.processes)
