"""Read progress of a pod: records and bytes read, for logs and the progress display."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO


@dataclass(frozen=True)
class ReadProgress:
    """Read progress of a pod at one time."""

    set: str
    """Name of the set that is being read."""
    records: int
    """Records read, of all sets."""
    bytes: int
    """Stored bytes read, of all objects."""
    total_bytes: int
    """Stored bytes of all input splits of the pod."""


ProgressCallback = Callable[[ReadProgress], None]


class ProgressTracker:
    """Counts the records and bytes that a pod has read.

    Args:
        total_bytes: stored bytes of all input splits of the pod.
    """

    def __init__(self, total_bytes: int) -> None:
        self._total_bytes = total_bytes
        self._records = 0
        self._finished_bytes = 0
        """Bytes of finished byte ranges and skipped input splits."""
        self._stream: BinaryIO | None = None
        self._start = 0

    def skip(self, size: int) -> None:
        """Count bytes that need not be read as read."""
        self._finished_bytes += size

    def begin(self, stream: BinaryIO, start: int) -> None:
        """Begin a byte range; until its end, the position of the stream counts.

        Args:
            stream: the object as it is stored, compressed or not.
            start: position of the range in the stream.
        """
        self._stream, self._start = stream, start

    def count_record(self) -> None:
        """Count a record of the current byte range."""
        self._records += 1

    def end(self, size: int) -> None:
        """End the current byte range and count its bytes."""
        self._stream = None
        self._finished_bytes += size

    def current(self, name: str) -> ReadProgress:
        """Return the progress; ``name`` is that of the set that is being read."""
        at = 0
        if self._stream is not None and not self._stream.closed:  # damaged files are closed early
            at = max(0, self._stream.tell() - self._start)
        # The last line of a byte range may end after the range.
        read = min(self._total_bytes, self._finished_bytes + at)
        return ReadProgress(name, self._records, read, self._total_bytes)
