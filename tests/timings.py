"""Durations of a test run by folder, file and set-up part, printed at its end."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

SLOWEST = 25  # number of files in the summary

parts: dict[str, float] = defaultdict(float)
"""Seconds by part, in the order of their start."""
files: dict[str, float] = defaultdict(float)
"""Seconds by file, including shared fixtures that its tests were the first to set up."""


@contextmanager
def timed(part: str) -> Iterator[None]:
    """Add the duration of a block to a part."""
    began = time.monotonic()
    try:
        yield
    finally:
        parts[part] += time.monotonic() - began


@contextmanager
def told(what: str) -> Iterator[None]:
    """Print the duration of a block, in the format of the Makefile's TIMED."""
    began = time.monotonic()
    yield
    print(f"[{what}: {time.monotonic() - began:.0f} s]", flush=True)


def slowest() -> list[tuple[str, float]]:
    """Return the slowest files and their seconds, the slowest first."""
    return sorted(files.items(), key=lambda entry: -entry[1])[:SLOWEST]
