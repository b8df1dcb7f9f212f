"""Where the harness keeps things, and who they belong to.

``cache()`` is kept between runs: built binaries, images. Below it, ``run/`` has one folder for
each running cluster, claimed by the process that started it. Whoever claims next first cleans up
the folders whose owner was killed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
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
def locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes; the kernel lets go of it when its holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def claim(name: str, *, keep: bool = False) -> Path:
    """A fresh folder for a cluster; raises Busy if the name is in use.

    With ``keep`` the claim holds until ``release``, else for as long as this process lives.
    """
    run = _run()
    with locked(run / ".lock"):
        _sweep(run)
        folder = run / name
        if folder.exists():
            raise Busy(f"{folder} is in use by {_owner(folder)}; `python -m cluster down` ends it")
        folder.mkdir(mode=0o700)
        owner = KEPT if keep else Path("/proc/self/stat").read_text()
        (folder / "owner").write_text(owner)
        return folder


def release(folder: Path) -> None:
    """Stop what runs in the folder, and remove it and all that belongs to it."""
    Processes(folder / "processes").stop_all()
    host.undo(folder)
    shutil.rmtree(folder)


def kept(name: str) -> Path | None:
    """The folder of a cluster that somebody keeps up, if there is one."""
    folder = _run() / name
    return folder if folder.exists() and _owner(folder) == KEPT else None


def claimed() -> set[str]:
    """The names that are claimed now."""
    return {entry.name for entry in _run().iterdir() if entry.is_dir()}


def sweep() -> list[Path]:
    """Release what killed runs have left; says which folders those were."""
    with locked(_run() / ".lock"):
        return _sweep(_run())


def _run() -> Path:
    return cache() / "run"


def _sweep(run: Path) -> list[Path]:
    abandoned = [entry for entry in run.iterdir() if entry.is_dir() and _owner(entry) is None]
    for folder in abandoned:
        release(folder)
    return abandoned


def _owner(folder: Path) -> str | None:
    record = folder / "owner"
    if record.exists() and record.read_text() == KEPT:
        return KEPT
    process = Process.recorded(record)
    return f"process {process.pid}" if process and process.alive else None
