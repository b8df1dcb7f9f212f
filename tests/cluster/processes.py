"""Child processes that can be stopped for certain, also by another process, also later.

Each process is recorded by its id *and* the time it started at, so that an id which the kernel
has given to somebody else since is never signalled. The record is written by the child itself
before it becomes the program it runs: there is no moment at which it runs unrecorded.
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
    """A process that should be running is not; the message has the end of its log."""


@dataclass(frozen=True)
class Process:
    """One process for all time: ``started`` is in clock ticks since the machine's boot."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The living process that has this id now."""
        stat = _stat(pid)
        return None if stat is None or stat[1] in "ZX" else cls(pid, stat[2])

    @classmethod
    def recorded(cls, record: Path) -> Process | None:
        """The process of a record, whether it still lives or not."""
        try:
            stat = _parse(record.read_text())
        except (FileNotFoundError, IndexError, ValueError):
            return None
        return cls(stat[0], stat[2])

    @property
    def alive(self) -> bool:
        return Process.of(self.pid) == self

    def signal(self, number: signal.Signals) -> bool:
        """Send a signal; false if the process is gone."""
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
    """(pid, state, start time, parent) of a line of proc_pid_stat(5)."""
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
        """Start a program in a session of its own, its output going to the log."""
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
        """The process started under this name, if it lives."""
        process = Process.recorded(self._record(name))
        return process if process and process.alive else None

    def require(self, name: str) -> Process:
        process = self.find(name)
        if process is None:
            raise Ended(f"{name} does not run; the end of its log:\n{self.tail(name)}")
        return process

    def names(self) -> list[str]:
        """What was started, the oldest first."""
        records = sorted(self.folder.glob("*.pid"), key=lambda record: record.stat().st_mtime_ns)
        return [record.stem for record in records]

    def stop(self, name: str, *, patience: float = 0) -> None:
        """Ask a process to end and wait ``patience`` seconds for it, then kill it."""
        process = self.find(name)
        if process and patience and process.signal(signal.SIGTERM):
            self._wait(process, patience)
        if process:
            # Children first: `unshare` and `nsenter` are gone long before the one they wait for,
            # and the first process of a PID namespace only ends when all the others have.
            for child in process.children():
                self._kill(name, child)
            self._kill(name, process)
        self._record(name).unlink(missing_ok=True)

    def stop_all(self) -> None:
        """Kill all of them, the last started first: what they worked on is thrown away."""
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
        """Whether the process ended in time; one of our own children is reaped as well."""
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
