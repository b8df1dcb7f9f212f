"""Changes that nodes make to the host itself: control groups and kernel settings.

Everything else of a node is in namespaces and disappears with its processes. These two are recorded
in the cluster's folder before they are changed, and ``undo`` restores them.
"""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_KERNEL = Path("/proc/sys")
# inotify instances of one user: kubelets and containerds of several nodes share them with all else
# that root runs, and a kubelet without one ends ("too many open files"). 128 by default.
_INOTIFY = "fs/inotify/max_user_instances"
_INOTIFY_INSTANCES = 1024
_SETTINGS = (
    _INOTIFY,
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
)


def remember_settings(folder: Path) -> None:
    """Record the kernel settings, and allow more inotify instances. Call before the first kubelet
    starts."""
    settings = {name: (_KERNEL / name).read_text() for name in _SETTINGS}
    (folder / "settings.json").write_text(json.dumps(settings))
    if int(settings[_INOTIFY]) < _INOTIFY_INSTANCES:
        (_KERNEL / _INOTIFY).write_text(str(_INOTIFY_INSTANCES))


def make_cgroup(name: str, folder: Path) -> None:
    """Create a control group in every hierarchy, and record it."""
    with (folder / "cgroups").open("a") as record:
        record.write(name + "\n")
    for hierarchy in _hierarchies():
        (hierarchy / name).mkdir(exist_ok=True)


def undo(folder: Path) -> None:
    """Restore the state recorded in the folder. Call after the nodes' processes have ended."""
    cgroups = folder / "cgroups"
    for name in cgroups.read_text().split() if cgroups.exists() else []:
        for hierarchy in _hierarchies():
            _remove(hierarchy / name)
    settings = folder / "settings.json"
    if settings.exists():
        for name, value in json.loads(settings.read_text()).items():
            if (_KERNEL / name).read_text() != value:
                (_KERNEL / name).write_text(value)


def _remove(group: Path, within: float = 30) -> None:
    """Remove a control group; it is busy until the last of its killed processes has ended."""
    until = time.monotonic() + within
    # cgroupfs allows only rmdir, from the leaves up; the files in it cannot be removed.
    for folder, _, _ in os.walk(group, topdown=False):
        while True:
            try:
                Path(folder).rmdir()
                break
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > until:
                    raise
                time.sleep(0.1)


def _hierarchies() -> list[Path]:
    if (_CGROUPS / "cgroup.controllers").exists():
        return [_CGROUPS]
    return [entry for entry in _CGROUPS.iterdir() if entry.is_dir() and not entry.is_symlink()]
