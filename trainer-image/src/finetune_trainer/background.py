"""A daemon thread that runs while a context lasts."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class BackgroundThread(ABC):
    """Context manager: runs ``run`` in a daemon thread until the context ends."""

    def __init__(self, name: str) -> None:
        self.ended = threading.Event()
        """Set when the context ends; ``run`` returns soon after."""
        self._thread = threading.Thread(target=self.run, name=name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.ended.set()

    @abstractmethod
    def run(self) -> None:
        """The work of the thread."""
