"""The operator as a real process, with its CPU time, memory, passes and writes."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from operator_process import OperatorProcess
from plane import BenchPlane

from finetune_api import names

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Figures:
    """Totals of an operator process since its start."""

    cpu: float
    """Seconds."""
    passes: int
    rss: float
    """MiB, now."""
    peak: float
    """MiB."""
    writes: Counter[str]
    """By resource; of all operator processes of the plane."""

    def since(self, before: Figures) -> Figures:
        """The figures of the time since ``before``; memory as it is now."""
        return Figures(
            self.cpu - before.cpu,
            self.passes - before.passes,
            self.rss,
            self.peak,
            self.writes - before.writes,
        )


class MeasuredOperator(OperatorProcess):
    """An operator process against a plane."""

    nice: ClassVar[int] = 0

    def __init__(self, plane: BenchPlane, log: Path) -> None:
        super().__init__(plane.user, log, "--leader-election", "false", "--progress", "direct")
        self._plane = plane

    def __enter__(self) -> Self:
        super().__enter__()
        os.setpriority(os.PRIO_PROCESS, self.process.pid, self.nice)
        return self

    def figures(self) -> Figures:
        proc = Path(f"/proc/{self.process.pid}")
        fields = (proc / "stat").read_text().rpartition(")")[2].split()
        memory = dict(
            line.split(":\t", 1) for line in (proc / "status").read_text().splitlines()
        )  # fmt: skip
        return Figures(
            cpu=(int(fields[11]) + int(fields[12])) / _TICKS,
            passes=int(self.metric("finetune_operator_reconcile_seconds_count") or 0),
            rss=int(memory["VmRSS"].split()[0]) / 1024,
            peak=int(memory["VmHWM"].split()[0]) / 1024,
            writes=self._plane.writes(names.FIELD_OWNER),
        )
