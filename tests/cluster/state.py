"""Folders of the test harness, and their owners.

``cache()`` is kept between runs: built binaries, images. In it, ``run/`` has one folder for each
running cluster, and a record of the process that owns the folder. ``claim`` first removes the
folders whose owner was killed.
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

KEPT = "kept"  # owner of a cluster that outlives the process that started it


class Busy(RuntimeError):
    """The folder belongs to a cluster that is in use."""


def cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root) / "finetune-operator"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Hold a lock between processes; the kernel releases it when its holder dies.

    Yields the lock's file descriptor: a child process that inherits it holds the lock too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle.fileno()


def claim(name: str, *, keep: bool = False) -> Path:
    """Create an empty folder for a cluster. Raises Busy if the name is in use.

    The claim holds until ``release``, and without ``keep`` at most as long as this process lives.
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
    """Stop the processes of the folder, restore the host's settings, and remove the folder."""
    Processes(folder / "processes").stop_all()
    host.undo(folder)
    # Much faster than shutil.rmtree for the tens of thousands of files of an image.
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    _record(folder.name).unlink(missing_ok=True)  # last, so that the name is claimed until then


def claimed() -> set[str]:
    """Return the names that are claimed now."""
    return {record.stem for record in _run().glob("*.owner")}


def kept(name: str) -> Path | None:
    """Return the folder of a cluster claimed with ``keep``, None if there is none."""
    return _run() / name if _owner(name) == KEPT else None


def sweep() -> list[str]:
    """Release the folders that killed runs have left. Returns their names."""
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
    """Return the owner of a name; None if there is none or its process has ended."""
    record = _record(name)
    try:
        if record.read_text() == KEPT:
            return KEPT
    except FileNotFoundError:
        return None
    process = Process.recorded(record)
    return f"process {process.pid}" if process and process.alive else None
