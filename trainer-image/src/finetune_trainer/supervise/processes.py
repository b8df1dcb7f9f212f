"""Processes below this one, on Linux: torchrun gives each worker a session of its own, so a process
group does not hold them. Elsewhere only what was started directly is known."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from typing import Final

_PR_SET_CHILD_SUBREAPER: Final = 36
_LINUX: Final = sys.platform == "linux"
_START_TIME: Final = 19
"""Field of /proc/self/stat, counted from behind the name: clock ticks since the machine's boot."""


def adopt_orphans() -> None:
    """Makes this process the parent of its descendants whose parents end, as process 1 is."""
    if _LINUX:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def descendants(pid: int) -> list[int]:
    """Processes below ``pid`` that run, parents first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = entry.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            children.setdefault(int(parent), []).append(int(entry.parent.name))
    found: list[int] = []
    front = [pid]
    while front:
        front = [child for parent in front for child in children.get(parent, ())]
        found += front
    return found


def kill_descendants(seconds: float = 10.0) -> None:
    """Kills everything below this process, and reaps what it was the parent of."""
    deadline = time.monotonic() + seconds
    while (below := descendants(os.getpid())) and time.monotonic() < deadline:
        for pid in below:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        _reap()
        time.sleep(0.01)
    _reap()


def machine_time() -> float:
    """Seconds on a clock that all processes of this machine read alike, and nobody sets."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if _LINUX else time.monotonic()


def started_at() -> float | None:
    """When this process was started, in ``machine_time``; None where the kernel won't say."""
    try:
        ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[_START_TIME]
        return int(ticks) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None


def oom_kills() -> int | None:
    """How often the kernel has killed in this container for want of memory; None: it won't say."""
    for path, key in _memory_files():
        try:
            words = dict(line.split() for line in path.read_text().splitlines())
            return int(words[key])
        except (OSError, KeyError, ValueError):
            continue
    return None


def _memory_files() -> list[tuple[Path, str]]:
    """Files of cgroup v2 and v1 that count: of this process's own group where it is visible (on a
    host), else at the mount's root (in a container)."""
    root = Path("/sys/fs/cgroup")
    own: dict[str, str] = {}
    try:
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            own[controllers] = path.lstrip("/")
    except OSError:
        return []
    v1 = next((path for names, path in own.items() if "memory" in names.split(",")), "")
    return [
        (root / "memory" / v1 / "memory.oom_control", "oom_kill"),
        (root / "memory" / "memory.oom_control", "oom_kill"),
        (root / own.get("", "") / "memory.events", "oom_kill"),
        (root / "memory.events", "oom_kill"),
    ]


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
