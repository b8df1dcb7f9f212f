"""How long each part of a test run took: printed at its end, by folder, with what was set up."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

parts: dict[str, float] = defaultdict(float)
"""Seconds by part, in the order in which the parts began."""


@contextmanager
def timed(part: str) -> Iterator[None]:
    """Count a block's time as this part's."""
    began = time.monotonic()
    try:
        yield
    finally:
        parts[part] += time.monotonic() - began
