"""Descendant processes of this one, found through /proc on Linux.

torchrun starts each worker in its own session, so killing a Unix process group would miss them.
On other systems no descendants are found.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Final

_PR_SET_CHILD_SUBREAPER: Final = 36
_LINUX: Final = sys.platform == "linux"
_START_TIME: Final = 19
"""Index of starttime in /proc/self/stat, counted after the command name. Unit: clock ticks since
boot."""


def adopt_orphans() -> None:
    """Make this process a subreaper: it adopts orphaned descendants in place of PID 1."""
    if _LINUX:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def descendants(pid: int) -> list[int]:
    """Return the running (not zombie) descendants of ``pid``, parents first."""
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


def kill_descendants(spare: Collection[int] = (), seconds: float = 10.0) -> None:
    """Kill and reap all descendants of this process but ``spare``, for at most ``seconds``."""
    deadline = time.monotonic() + seconds
    killed: set[int] = set()
    while time.monotonic() < deadline:
        below = set(descendants(os.getpid())) - set(spare)
        if not below:
            break
        for pid in below:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed |= below
        _reap(killed)
        time.sleep(0.01)
    _reap(killed)


def machine_time() -> float:
    """Return seconds of a monotonic clock that all processes of this machine share."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if _LINUX else time.monotonic()


def started_at() -> float | None:
    """Return the start time of this process in ``machine_time``; None: unknown."""
    try:
        ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[_START_TIME]
        return int(ticks) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None


def oom_kills() -> int | None:
    """Return the number of OOM kills in this container; None: unknown."""
    for path, key in _memory_files():
        try:
            words = dict(line.split() for line in path.read_text().splitlines())
            return int(words[key])
        except (OSError, KeyError, ValueError):
            continue
    return None


def _memory_files() -> list[tuple[Path, str]]:
    """Return the files of cgroup v1 and v2 with OOM-kill counters: of this process's own group
    (visible on a host) and at the mount's root (in a container)."""
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


def _reap(pids: Collection[int]) -> None:
    """Reap those that are children of this process."""
    for pid in pids:
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
