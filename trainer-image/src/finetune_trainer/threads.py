"""OpenMP settings of a process: number of threads and how they wait.

OpenMP (torch's wheel ships GNU's libgomp) reads both from the environment when torch is loaded. So
the parent process sets them, or the process itself before it imports torch. Variables that the user
has set are kept.

Threads wait passively: spinning at a barrier helps only if every thread has a core of its own. On
shared cores, spinning threads take CPU time from the thread that they wait for. Training processes
adapt to the load instead (``adaptive_spinning``).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from finetune_trainer.adaptive_spinning import can_adapt

ENV_THREADS: Final = "OMP_NUM_THREADS"
_WAITING: Final = frozenset({"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"})
"""Variables that set the wait policy of OpenMP: the standard's, GNU's, LLVM's and Intel's."""
_CGROUPS: Final = Path("/sys/fs/cgroup")


def thread_environment(
    environ: Mapping[str, str], processes: int = 1, cores: int | None = None, *,
    adaptive: bool = False,
) -> dict[str, str]:  # fmt: skip
    """Return the variables to add to ``environ`` for each of ``processes`` that share the cores.
    Variables that the user has set are not among them.

    Args:
        cores: cores to share; default: all cores that this process may use.
        adaptive: whether the processes adapt how their threads wait, where the system allows it.
    """
    added = {}
    if ENV_THREADS not in environ:
        shared = count_cores() if cores is None else cores
        added[ENV_THREADS] = str(max(1, shared // processes))
    if not _WAITING & environ.keys() and not (adaptive and can_adapt()):
        added["OMP_WAIT_POLICY"] = "PASSIVE"
    return added


def adapts(environ: Mapping[str, str]) -> bool:
    """Whether a process with this environment, which ``thread_environment`` made, adapts how its
    threads wait."""
    return can_adapt() and not _WAITING & environ.keys()


def count_cores(cgroups: Path = _CGROUPS, groups: Path = Path("/proc/self/cgroup")) -> int:
    """Return the number of cores that this process may use: its CPU affinity, capped by the CPU
    limit of its pod (cgroup v2 or v1), rounded up.

    Args:
        cgroups: mount point of the cgroups.
        groups: file with this process's cgroups.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    limits = (_limit(folder) for folder in _folders(cgroups, groups))
    return max(1, min([cores, *(math.ceil(limit) for limit in limits if limit is not None)]))


def _folders(cgroups: Path, groups: Path) -> list[Path]:
    """Return the cgroup folders that may limit this process's CPU time, with all parents. In a
    container its own group is the mount's root."""
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
    """Return the CPU limit of a cgroup in cores; None: no limit."""
    try:
        if (both := folder / "cpu.max").exists():  # cgroup v2
            quota, period = both.read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        limit = int(quota) / int(period)
    except (OSError, ValueError):  # no such file, or "max"
        return None
    return limit if limit > 0 else None  # cgroup v1: -1 means no limit
