"""Where the harness keeps things, and who they belong to.

``cache()`` is kept between runs: built binaries, images. Below it, ``run/`` has one folder for
each running cluster, and beside it a record of the process that claimed it. Whoever claims next
first cleans up the folders whose owner was killed.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster import host
from cluster.processes import Process, Processes

KEPT = "kept"  # the owner of a cluster that outlives the process which started it


class Busy(RuntimeError):
    """The folder belongs to a cluster that is in use."""


def cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root) / "finetune-operator"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Hold a lock between processes; the kernel lets go of it when its holder dies.

    Yields the lock's file descriptor: a child process that inherits it holds the lock too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle.fileno()


def claim(name: str, *, keep: bool = False) -> Path:
    """A fresh folder for a cluster; raises Busy if the name is in use.

    With ``keep`` the claim holds until ``release``, else for as long as this process lives.
    """
    with locked(_run() / ".lock"):
        _sweep()
        owner = _owner(name)
        if owner:
            raise Busy(f"{name} is in use by {owner}; `python -m cluster down` ends a kept one")
        _record(name).write_text(KEPT if keep else Path("/proc/self/stat").read_text())
        folder = _run() / name
        folder.mkdir(mode=0o700)
        return folder


def release(folder: Path) -> None:
    """Stop what runs in the folder, and remove it and all that belongs to it."""
    Processes(folder / "processes").stop_all()
    host.undo(folder)
    # Much faster than shutil.rmtree on the tens of thousands of files of an image.
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    _record(folder.name).unlink(missing_ok=True)  # last: until then it is not anybody's to sweep


def claimed() -> set[str]:
    """The names that are claimed now."""
    return {record.stem for record in _run().glob("*.owner")}


def kept(name: str) -> Path | None:
    """The folder of a cluster that somebody keeps up, if there is one."""
    return _run() / name if _owner(name) == KEPT else None


def sweep() -> list[str]:
    """Release what killed runs have left; says under which names."""
    with locked(_run() / ".lock"):
        return _sweep()


def _sweep() -> list[str]:
    abandoned = sorted(name for name in claimed() if _owner(name) is None)
    for name in abandoned:
        release(_run() / name)
    return abandoned


def _run() -> Path:
    folder = cache() / "run"
    folder.mkdir(exist_ok=True)
    return folder


def _record(name: str) -> Path:
    return _run() / f"{name}.owner"


def _owner(name: str) -> str | None:
    """Who has the name now: None if nobody has, or a process that is gone."""
    record = _record(name)
    try:
        if record.read_text() == KEPT:
            return KEPT
    except FileNotFoundError:
        return None
    process = Process.recorded(record)
    return f"process {process.pid}" if process and process.alive else None
