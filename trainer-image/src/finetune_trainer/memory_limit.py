"""The memory that this process may use, as its control group (a container) allows."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_GROUPS: Final = Path("/sys/fs/cgroup")


def memory_limit(groups: Path = _GROUPS) -> int | None:
    """Bytes of memory that the processes of this control group may have together; None: no limit
    is set."""
    limit = _numbers(groups / "memory.max")
    return int(limit[0]) if limit else None


def count_oom_kills(groups: Path = _GROUPS) -> int:
    """How often the kernel has killed a process of this control group for want of memory."""
    try:
        lines = (groups / "memory.events").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def _numbers(path: Path) -> list[float]:
    """The numbers in a file; none where one is the word max, or there is no file."""
    try:
        return [float(word) for word in path.read_text().split()]
    except (OSError, ValueError):
        return []
