"""Read progress of prepare, written to its log and to a file for ``finetune run``."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from finetune_trainer.supervise.worker_files import write_whole

if TYPE_CHECKING:
    from finetune_trainer.prepare.mapping.progress import ReadProgress

log = logging.getLogger(__name__)

FILE: Final = "reading.json"
_LOG_SECONDS: Final = 10.0


class ProgressFile:
    """Writes every progress report to a file in a folder, and at most one per 10 s to the log."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._logged = time.monotonic()

    def __call__(self, progress: ReadProgress) -> None:
        share = progress.bytes / max(1, progress.total_bytes)
        told = {"records": progress.records, "share": min(1.0, share)}
        write_whole(self._path, json.dumps(told))
        if time.monotonic() - self._logged >= _LOG_SECONDS:
            self._logged = time.monotonic()
            log.info("%s: %d records read, %d %%", progress.set, progress.records, 100 * share)


def read_progress(folder: Path) -> tuple[int, float] | None:
    """Return the records read and the share of the bytes (0 to 1); None before the first report."""
    try:
        raw = json.loads((folder / FILE).read_text())
    except FileNotFoundError:
        return None
    return raw["records"], raw["share"]
