"""Child processes that can be stopped reliably, also later by another process.

Each process is recorded by its id *and* its start time, so that a reused id is never signalled. The
child itself writes the record before it executes the program, so no program runs unrecorded.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_RECORD_THEN_RUN = 'cat /proc/$$/stat >"$0" && exec "$@"'


class Ended(Exception):
    """A required process is not running; the message has the end of its log."""


@dataclass(frozen=True)
class Process:
    """A process, identified by id and start time; ``started`` is in clock ticks since boot."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """Return the process that has this id now; None if there is none, or a zombie."""
        stat = _stat(pid)
        return None if stat is None or stat[1] in "ZX" else cls(pid, stat[2])

    @classmethod
    def recorded(cls, record: Path) -> Process | None:
        """Return the process of a record, dead or alive; None without a complete record."""
        try:
            stat = _parse(record.read_text())
        except (FileNotFoundError, IndexError, ValueError):
            return None
        return cls(stat[0], stat[2])

    @property
    def alive(self) -> bool:
        return Process.of(self.pid) == self

    def signal(self, number: signal.Signals) -> bool:
        """Send a signal. Returns false if the process has ended."""
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            if not self.alive:
                return False
            signal.pidfd_send_signal(handle, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(handle)
        return True

    def children(self) -> list[Process]:
        found = []
        for entry in Path("/proc").iterdir():
            stat = _stat(int(entry.name)) if entry.name.isdigit() else None
            if stat and stat[3] == self.pid and stat[1] not in "ZX":
                found.append(Process(stat[0], stat[2]))
        return found


def _stat(pid: int) -> tuple[int, str, int, int] | None:
    try:
        return _parse(Path(f"/proc/{pid}/stat").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return None


def _parse(stat: str) -> tuple[int, str, int, int]:
    """Return (pid, state, start time, parent) from a line of proc_pid_stat(5)."""
    fields = stat[stat.rindex(")") + 2 :].split()
    return int(stat.split(" ", 1)[0]), fields[0], int(fields[19]), int(fields[1])


class Processes:
    """The processes of one folder: ``NAME.pid`` and ``NAME.log`` for each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mine: dict[int, subprocess.Popen[bytes]] = {}

    def start(
        self, name: str, argv: Sequence[str | Path], *, env: Mapping[str, str] | None = None
    ) -> Process:
        """Start a program in its own session, with output to the log. Raises Ended on failure."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._record(name).unlink(missing_ok=True)
        with self.log(name).open("ab") as log:
            child = subprocess.Popen(
                ["/bin/sh", "-c", _RECORD_THEN_RUN, str(self._record(name)), *map(str, argv)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=None if env is None else {**os.environ, **env},
                start_new_session=True,
            )
        self._mine[child.pid] = child
        while (process := Process.recorded(self._record(name))) is None:
            if child.poll() is not None:
                raise Ended(f"{name} could not be started:\n{self.tail(name)}")
            time.sleep(0.002)
        return process

    def find(self, name: str) -> Process | None:
        """Return the process started under this name, None if it has ended."""
        process = Process.recorded(self._record(name))
        return process if process and process.alive else None

    def require(self, name: str) -> Process:
        process = self.find(name)
        if process is None:
            raise Ended(f"{name} does not run; the end of its log:\n{self.tail(name)}")
        return process

    def names(self) -> list[str]:
        """Return the names of all started processes, the oldest first."""
        records = sorted(self.folder.glob("*.pid"), key=lambda record: record.stat().st_mtime_ns)
        return [record.stem for record in records]

    def stop(self, name: str, *, patience: float = 0) -> None:
        """Stop a process: SIGTERM, up to ``patience`` seconds of waiting, then SIGKILL."""
        process = self.find(name)
        if process and patience and process.signal(signal.SIGTERM):
            self._wait(process, patience)
        if process:
            # Children first: killed `unshare` and `nsenter` end long before their child does, and
            # process 1 of a PID namespace ends only after all other processes of it have.
            for child in process.children():
                self._kill(name, child)
            self._kill(name, process)
        self._record(name).unlink(missing_ok=True)

    def stop_all(self) -> None:
        """Kill all processes, the last started first. Their data is discarded."""
        for name in reversed(self.names()):
            self.stop(name)

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def tail(self, name: str, lines: int = 20) -> str:
        log = self.log(name)
        text = log.read_text(errors="replace") if log.exists() else "(no log)"
        return "\n".join(text.splitlines()[-lines:])

    def _record(self, name: str) -> Path:
        return self.folder / f"{name}.pid"

    def _kill(self, name: str, process: Process) -> None:
        if process.signal(signal.SIGKILL) and not self._wait(process, 20):
            raise RuntimeError(f"{name} (process {process.pid}) does not end when killed")

    def _wait(self, process: Process, patience: float) -> bool:
        """Wait for a process to end, and reap it if it is a child. Returns whether it ended."""
        child = self._mine.get(process.pid)
        if child is not None:
            try:
                child.wait(patience)
            except subprocess.TimeoutExpired:
                return False
            del self._mine[process.pid]
            return True
        until = time.monotonic() + patience
        while process.alive:
            if time.monotonic() > until:
                return False
            time.sleep(0.02)
        return True
