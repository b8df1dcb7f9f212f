"""What kubelets change on the host itself: control groups and kernel settings.

Everything else of a node lives in namespaces and goes with its processes. These two are noted
down in the cluster's folder before they are changed, and ``undo`` puts them back.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_KERNEL = Path("/proc/sys")
_SET_BY_KUBELET = (
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
)


def remember_settings(folder: Path) -> None:
    """To be called before the first kubelet starts."""
    settings = {name: (_KERNEL / name).read_text() for name in _SET_BY_KUBELET}
    (folder / "settings.json").write_text(json.dumps(settings))


def make_cgroup(name: str, folder: Path) -> None:
    """Make a control group in every hierarchy."""
    with (folder / "cgroups").open("a") as record:
        record.write(name + "\n")
    for hierarchy in _hierarchies():
        (hierarchy / name).mkdir(exist_ok=True)


def undo(folder: Path) -> None:
    """Put back what was noted down in the folder; the nodes' processes are gone by now."""
    cgroups = folder / "cgroups"
    for name in cgroups.read_text().split() if cgroups.exists() else []:
        for hierarchy in _hierarchies():
            _remove(hierarchy / name)
    settings = folder / "settings.json"
    if settings.exists():
        for name, value in json.loads(settings.read_text()).items():
            if (_KERNEL / name).read_text() != value:
                (_KERNEL / name).write_text(value)


def _remove(group: Path) -> None:
    # Only folders can be removed here, and only from the leaves up; the files are the kernel's.
    for folder, _, _ in os.walk(group, topdown=False):
        Path(folder).rmdir()


def _hierarchies() -> list[Path]:
    if (_CGROUPS / "cgroup.controllers").exists():
        return [_CGROUPS]
    return [entry for entry in _CGROUPS.iterdir() if entry.is_dir() and not entry.is_symlink()]
