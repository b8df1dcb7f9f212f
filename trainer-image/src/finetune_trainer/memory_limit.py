"""Memory limit and OOM kills of this process's control group (in a pod: its container), and a
limit for a part of this process's work."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_GROUPS: Final = Path("/sys/fs/cgroup")
_STATUS: Final = Path("/proc/self/statm")


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


@contextmanager
def bounded_memory(more: int) -> Iterator[None]:
    """Limit the memory that this process allocates within the context.

    The kernel refuses allocations above the limit, which native code cannot evade: a MemoryError
    (pyarrow: ArrowMemoryError) instead of an OOM kill. Without /proc (macOS) nothing is limited.

    Args:
        more: bytes beside what the process has now, for all its threads together.
    """
    try:
        data = int(_STATUS.read_text().split()[5]) * resource.getpagesize()
    except OSError:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = data + more
    resource.setrlimit(resource.RLIMIT_DATA, (_least(wanted, soft, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _least(*limits: int) -> int:
    """Return the lowest of some limits; ``RLIM_INFINITY`` is none."""
    return min(limit for limit in limits if limit != resource.RLIM_INFINITY)
