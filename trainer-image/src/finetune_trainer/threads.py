"""How many threads a process computes with, and how they wait for each other.

OpenMP (torch's wheel brings GNU's, libgomp) reads both from the environment when torch is loaded:
who starts a process says so there, or the process itself before it imports torch. What the user has
set stays.

Threads that spin at a barrier for the next piece of work are of use only where every thread has a
core of its own: beside a busy neighbour, they burn the time of the thread that they wait for.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

ENV_THREADS: Final = "OMP_NUM_THREADS"
_WAITING: Final = frozenset({"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"})
"""What OpenMP (LLVM's and Intel's too) reads its way of waiting from."""
_CGROUPS: Final = Path("/sys/fs/cgroup")


def thread_environment(
    environ: Mapping[str, str], processes: int = 1, cores: int | None = None
) -> dict[str, str]:
    """Variables that are to be added to ``environ`` for each of so many processes that share the
    cores; none that the user has set.

    Args:
        cores: absent: those that this process may use.
    """
    added = {}
    if ENV_THREADS not in environ:
        shared = count_cores() if cores is None else cores
        added[ENV_THREADS] = str(max(1, shared // processes))
    if not _WAITING & environ.keys():
        added["OMP_WAIT_POLICY"] = "PASSIVE"
    return added


def count_cores(cgroups: Path = _CGROUPS, groups: Path = Path("/proc/self/cgroup")) -> int:
    """Cores that this process may use: those that it may run on, and no more than the CPU limit of
    its pod (cgroup v2 or v1), rounded up.

    Args:
        cgroups: where cgroups are mounted.
        groups: file that names this process's groups.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    limits = (_limit(folder) for folder in _folders(cgroups, groups))
    return max(1, min([cores, *(math.ceil(limit) for limit in limits if limit is not None)]))


def _folders(cgroups: Path, groups: Path) -> list[Path]:
    """This process's groups that may limit its CPU time, and all groups above them. In a container
    its own group is the mount's root."""
    found = [cgroups, cgroups / "cpu"]
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        folder = cgroups / "cpu" if controllers else cgroups
        for part in path.strip("/").split("/"):
            folder /= part
            found.append(folder)
    return found


def _limit(folder: Path) -> float | None:
    """CPU limit of a group, in cores; None where it has none."""
    try:
        if (both := folder / "cpu.max").exists():  # cgroup v2
            quota, period = both.read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        limit = int(quota) / int(period)
    except (OSError, ValueError):  # no such file; "max"
        return None
    return limit if limit > 0 else None  # -1: none, in cgroup v1
