"""How long each part of a test run took: printed at its end, by folder and for the slowest files,
with what was set up."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

SLOWEST = 25  # files that are named

parts: dict[str, float] = defaultdict(float)
"""Seconds by part, in the order in which the parts began."""
files: dict[str, float] = defaultdict(float)
"""Seconds by file, with what its tests were the first to set up."""


@contextmanager
def timed(part: str) -> Iterator[None]:
    """Count a block's time as this part's."""
    began = time.monotonic()
    try:
        yield
    finally:
        parts[part] += time.monotonic() - began


@contextmanager
def told(what: str) -> Iterator[None]:
    """Print how long a block took, as the Makefile does for its commands."""
    began = time.monotonic()
    yield
    print(f"[{what}: {time.monotonic() - began:.0f} s]", flush=True)


def slowest() -> list[tuple[str, float]]:
    """The files that took longest, the longest first."""
    return sorted(files.items(), key=lambda entry: -entry[1])[:SLOWEST]
