"""Files that the supervisor and the training processes exchange, in one shared folder.

    stop                request of the supervisor: save and exit
    grow                request of the agent: save, so that the gang starts again with more nodes
    failure-<rank>.json why a worker ended (``results.Failure``)
    committed           a checkpoint of this start is valid
    result.json         result of the training (``results.TrainSummary``), written by rank 0
    time.json           how the time was spent (``time_use.TimeUse``), written by rank 0

A worker without a supervisor (started by hand) has no folder: it receives no stop request and
writes no files. Environment variables hold the time since when the node has had no workers, and the
folder of the start before.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Final

from finetune_api.base import Record
from finetune_api.results import Failure, TrainSummary
from finetune_api.time_use import TimeUse
from finetune_trainer.failures import PEER_LOST, failure_of
from finetune_trainer.supervise.processes import machine_time

ENV_FOLDER: Final = "FINETUNE_WORKER_FILES"
ENV_LAUNCHED: Final = "FINETUNE_LAUNCHED"
ENV_PREVIOUS: Final = "FINETUNE_PREVIOUS_START"
STOP: Final = "stop"
GROW: Final = "grow"
COMMITTED: Final = "committed"
RESULT: Final = "result.json"
TIME: Final = "time.json"
_ABORT: Final = "watchdog thread terminated with exception: "
"""Text that torch prints before the error when NCCL's watchdog aborts a process."""
_TAIL: Final = 1 << 16
"""Bytes at the end of a worker's stderr to search: the process ends right after the text."""


def stop_requested() -> bool:
    """Whether this node was requested to stop. Cheap enough to call at every step."""
    folder = _folder()
    return folder is not None and (folder / STOP).exists()


def grow_requested() -> bool:
    """Whether another node waits to join the gang. As cheap as ``stop_requested``."""
    folder = _folder()
    return folder is not None and (folder / GROW).exists()


def launched_at() -> float | None:
    """Return since when this node has had no workers, in ``processes.machine_time``: since the
    supervisor's start, or the end of the workers before."""
    told = os.environ.get(ENV_LAUNCHED)
    return float(told) if told else None


def previous_start() -> tuple[float | None, TimeUse | None]:
    """Return what this node knows of the workers before: the Unix time at which they ended, and
    rank 0's last account of the time. Nothing, if the pod is new."""
    folder, launched = os.environ.get(ENV_PREVIOUS), launched_at()
    if not folder or launched is None:
        return None, None
    return time.time() - machine_time() + launched, read_time(Path(folder))


def report_failure(error: BaseException) -> None:
    """Report to the supervisor why this process ends."""
    if (folder := _folder()) is not None:
        name = f"failure-{os.environ.get('RANK', '0')}.json"
        write_whole(folder / name, _text(failure_of(error)))


def note_commit() -> None:
    """Report to the supervisor that a checkpoint has become valid."""
    if (folder := _folder()) is not None:
        write_whole(folder / COMMITTED, "")


def leave_result(summary: TrainSummary) -> None:
    """Report the result of the training to the supervisor; called by rank 0."""
    if (folder := _folder()) is not None:
        write_whole(folder / RESULT, _text(summary))


def leave_time(account: TimeUse) -> None:
    """Report how the time was spent so far; called by rank 0."""
    if (folder := _folder()) is not None:
        write_whole(folder / TIME, _text(account))


def has_committed(folder: Path) -> bool:
    """Whether a checkpoint has become valid during a start."""
    return (folder / COMMITTED).exists()


def ask_to_stop(folder: Path) -> None:
    """Request the workers of this node to save and exit."""
    (folder / STOP).touch()


def ask_to_grow() -> None:
    """Request this node's workers to save and exit, because another node waits to join; called by
    the agent."""
    if (folder := _folder()) is not None:
        (folder / GROW).touch()


def read_failure(folder: Path) -> Failure | None:
    """Return the failure of this node's workers: the first with a cause of its own, else a lost
    peer, else an interruption; None: no worker reported one."""
    files = sorted(folder.glob("failure-*.json"), key=lambda path: path.stat().st_mtime_ns)
    found = [Failure.model_validate_json(path.read_text()) for path in files]
    return min(found, key=_follows_from_others, default=None)


def read_result(folder: Path) -> TrainSummary | None:
    """Return the result of the training; None: rank 0 ran on another node."""
    path = folder / RESULT
    return TrainSummary.model_validate_json(path.read_text()) if path.exists() else None


def read_time(folder: Path) -> TimeUse | None:
    """Return how the time was spent; None: rank 0 ran on another node, or ended before it claimed
    the run."""
    path = folder / TIME
    return TimeUse.model_validate_json(path.read_text()) if path.exists() else None


def read_abort(logs: Path) -> str:
    """Return the error with which NCCL's watchdog aborted a worker of this node; empty: none.

    Args:
        logs: torchrun's log folder, with the workers' stderr.
    """
    for path in sorted(logs.glob("*/attempt_*/*/stderr.log")):
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            text = file.read().decode(errors="replace")
        if (at := text.find(_ABORT)) >= 0:
            return text[at + len(_ABORT) :]
    return ""


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically; create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text)
    part.replace(path)


def _text(words: Record) -> str:
    """Return JSON that allows NaN and infinity: metrics may have these values."""
    return json.dumps(words.to_json())


def _follows_from_others(failure: Failure) -> int:
    if failure.failure_class == "Preempted":
        return 2
    return int(failure.reason == PEER_LOST)


def _folder() -> Path | None:
    name = os.environ.get(ENV_FOLDER)
    return Path(name) if name else None
