"""A make-believe machine: namespaces of its own for processes, mounts and, if wanted, network.

Its life is that of one process (``pause``, process 1 in there). Kill it and everything in the
machine is gone at once, like a machine that loses power: processes, containers, mounts, network
interfaces. That makes both the tests of failing nodes and the cleaning up simple and certain.
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

# In the machine these are its own, from its folder, so that nothing is written to the host's.
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
    """``folder`` keeps its /var/lib over a restart; /run is fresh each time."""

    def __init__(self, name: str, folder: Path, processes: Processes) -> None:
        self.name = name
        self.folder = folder
        self.processes = processes

    @property
    def run(self) -> Path:
        """The machine's /run, seen from the host."""
        return self.folder / "run"

    @property
    def lib(self) -> Path:
        """The machine's /var/lib, seen from the host."""
        return self.folder / "lib"

    def power_on(self, *, network: bool) -> None:
        """Start its first process; with ``network`` in a network namespace, without any link."""
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
        """Lose power: no process in there gets to say or save anything."""
        self.processes.stop(self.name)
        for name in self.processes.names():
            if name.startswith(f"{self.name}."):
                self.processes.stop(name)

    @property
    def first_process(self) -> Process:
        """Process 1 of the machine, as the host sees it."""
        children = self.processes.require(self.name).children()
        if not children:
            raise RuntimeError(f"{self.name} has no first process yet")
        return children[0]

    def start(self, program: str, argv: Sequence[str | Path]) -> None:
        """Start a program in the machine; its log and record are NAME.PROGRAM."""
        self.processes.start(f"{self.name}.{program}", [*self._enter(), *argv])

    def signal(self, program: str, number: signal.Signals) -> None:
        """Signal a program that ``start`` started."""
        for process in self.processes.require(f"{self.name}.{program}").children():
            process.signal(number)

    def stop(self, program: str, *, patience: float) -> None:
        """Let a program of the machine end in good order."""
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
        """What a command prints that is run in the machine."""
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
