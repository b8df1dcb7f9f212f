"""Memory limit and OOM kills of this process's control group (in a pod: its container)."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_GROUPS: Final = Path("/sys/fs/cgroup")


def memory_limit(groups: Path = _GROUPS) -> int | None:
    """Return the memory limit of the control group in bytes, shared by all its processes; None: no
    limit."""
    limit = _numbers(groups / "memory.max")
    return int(limit[0]) if limit else None


def count_oom_kills(groups: Path = _GROUPS) -> int:
    """Return how many processes of this control group the kernel has OOM-killed."""
    try:
        lines = (groups / "memory.events").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def _numbers(path: Path) -> list[float]:
    """Return the numbers in a file; none if it contains ``max`` or does not exist."""
    try:
        return [float(word) for word in path.read_text().split()]
    except (OSError, ValueError):
        return []
