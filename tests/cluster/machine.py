"""A simulated machine: its own namespaces for processes, mounts and, optionally, network.

The machine exists as long as its process 1 (``pause``). Killing process 1 removes everything in the
machine, as a power failure would: processes, containers, mounts, network interfaces. Tests of
failing nodes and the clean-up both rely on this.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from cluster import state
from cluster.api import eventually
from cluster.build import binary
from cluster.processes import Ended, Process, Processes

# Folders of the machine that are mounted over the host's, so that the host's are not written to.
_OWN = {"lib": "/var/lib", "log": "/var/log", "run": "/run"}

_FIRST_PROCESS = """
set -e
mount --make-rshared /
hostname "$2"
mount --bind "$1/lib" /var/lib
mount --bind "$1/log" /var/log
mount --bind "$1/run" /run
exec "$3"
"""


class Machine:
    """A machine. ``folder`` has its /var/lib, kept over a restart, and its /run, which is not."""

    def __init__(self, name: str, folder: Path, processes: Processes) -> None:
        self.name = name
        self.folder = folder
        self.processes = processes

    @property
    def run(self) -> Path:
        """The machine's /run, as a path of the host."""
        return self.folder / "run"

    @property
    def lib(self) -> Path:
        """The machine's /var/lib, as a path of the host."""
        return self.folder / "lib"

    def power_on(self, *, network: bool) -> None:
        """Start process 1; with ``network`` in its own network namespace, without interfaces."""
        if any(state.cache().is_relative_to(path) for path in _OWN.values()):
            raise RuntimeError(f"{state.cache()} is hidden inside the nodes; set XDG_CACHE_HOME")
        shutil.rmtree(self.run, ignore_errors=True)
        for name in _OWN:
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        apart = ["--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        pause = binary("pause")
        first: list[str | Path] = ["sh", "-c", _FIRST_PROCESS, "sh", self.folder, self.name, pause]
        self.processes.start(
            self.name, ["unshare", *apart, *(["--net"] if network else []), *first]
        )
        eventually(f"{self.name} is up", lambda: self._is_up(pause), within=10)

    def power_off(self) -> None:
        """Kill all processes of the machine, without a chance to save or report anything."""
        self.processes.stop(self.name)
        for name in self.processes.names():
            if name.startswith(f"{self.name}."):
                self.processes.stop(name)

    @property
    def first_process(self) -> Process:
        """Process 1 of the machine, with its process id on the host."""
        children = self.processes.require(self.name).children()
        if not children:
            raise RuntimeError(f"{self.name} has no first process yet")
        return children[0]

    def start(self, program: str, argv: Sequence[str | Path]) -> None:
        """Start a program in the machine; its log and record are named NAME.PROGRAM."""
        self.processes.start(f"{self.name}.{program}", [*self._enter(), *argv])

    def signal(self, program: str, number: signal.Signals) -> None:
        """Send a signal to a program started by ``start``."""
        for process in self.processes.require(f"{self.name}.{program}").children():
            process.signal(number)

    def stop(self, program: str, *, patience: float) -> None:
        """Terminate a program with SIGTERM; kill it after ``patience`` seconds."""
        self.signal(program, signal.SIGTERM)
        try:
            eventually(
                f"{self.name}.{program} ended",
                lambda: self.processes.find(f"{self.name}.{program}") is None,
                within=patience,
            )
        finally:
            self.processes.stop(f"{self.name}.{program}")

    def execute(self, *argv: str | Path, stdin: str | None = None) -> str:
        """Run a command in the machine and return its output. Raises RuntimeError on failure."""
        done = subprocess.run([*self._enter(), *argv], input=stdin, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, argv))} in {self.name}: {done.stderr.strip()}")
        return done.stdout

    def _enter(self) -> list[str]:
        target = self.first_process.pid
        return ["nsenter", f"--target={target}", "--mount", "--uts", "--pid", "--net", "--"]

    def _is_up(self, pause: Path) -> bool:
        if self.processes.find(self.name) is None:
            raise Ended(f"{self.name} did not start:\n{self.processes.tail(self.name)}")
        return Path(f"/proc/{self.first_process.pid}/exe").resolve() == pause.resolve()
