"""The few words between a training process and the supervisor: files in a folder that both know.

    stop                the supervisor asks the workers to save and leave
    failure-<rank>.json why a worker ended (``results.Failure``)
    result.json         what the gang did (``results.TrainSummary``), from its first process

A worker that runs without a supervisor (by hand) is never asked to stop, and leaves no words. When
the supervisor began to start the workers, it tells by an environment variable.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final

from finetune_api.base import Record
from finetune_api.results import Failure, TrainSummary
from finetune_trainer.failures import PEER_LOST, failure_of

ENV_FOLDER: Final = "FINETUNE_WORKER_FILES"
ENV_LAUNCHED: Final = "FINETUNE_LAUNCHED"
STOP: Final = "stop"
RESULT: Final = "result.json"
_ABORT: Final = "watchdog thread terminated with exception: "
"""What torch prints, with the error, before NCCL's watchdog aborts a process."""
_TAIL: Final = 1 << 16
"""Bytes of a worker's stderr in which it is looked for: the process ends with it."""


def stop_requested() -> bool:
    """Whether this pod was told to stop: cheap enough for every step."""
    folder = _folder()
    return folder is not None and (folder / STOP).exists()


def launched_at() -> float | None:
    """When the supervisor began to start the workers, in ``processes.machine_time``."""
    told = os.environ.get(ENV_LAUNCHED)
    return float(told) if told else None


def report_failure(error: BaseException) -> None:
    """Tells the supervisor why this process ends."""
    if (folder := _folder()) is not None:
        name = f"failure-{os.environ.get('RANK', '0')}.json"
        write_whole(folder / name, _text(failure_of(error)))


def leave_result(summary: TrainSummary) -> None:
    """Tells the supervisor what the gang did; from the gang's first process."""
    if (folder := _folder()) is not None:
        write_whole(folder / RESULT, _text(summary))


def ask_to_stop(folder: Path) -> None:
    """Asks the workers of this node to save and leave."""
    (folder / STOP).touch()


def read_failure(folder: Path) -> Failure | None:
    """Why the workers of this node ended: the first that failed of itself; else one that lost its
    peers; else one that was interrupted."""
    files = sorted(folder.glob("failure-*.json"), key=lambda path: path.stat().st_mtime_ns)
    found = [Failure.model_validate_json(path.read_text()) for path in files]
    return min(found, key=_follows_from_others, default=None)


def read_result(folder: Path) -> TrainSummary | None:
    """What the gang did, where its first process ran on this node."""
    path = folder / RESULT
    return TrainSummary.model_validate_json(path.read_text()) if path.exists() else None


def read_abort(logs: Path) -> str:
    """Why NCCL's watchdog ended a worker of this node, as it printed it; empty: it did not.

    Args:
        logs: torchrun's folder of the workers' stderr.
    """
    for path in sorted(logs.glob("*/attempt_*/*/stderr.log")):
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            text = file.read().decode(errors="replace")
        if (at := text.find(_ABORT)) >= 0:
            return text[at + len(_ABORT) :]
    return ""


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is never seen half written; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text)
    part.replace(path)


def _text(words: Record) -> str:
    """JSON that has NaN and infinity too: a metric may be one."""
    return json.dumps(words.to_json())


def _follows_from_others(failure: Failure) -> int:
    if failure.failure_class == "Preempted":
        return 2
    return int(failure.reason == PEER_LOST)


def _folder() -> Path | None:
    name = os.environ.get(ENV_FOLDER)
    return Path(name) if name else None
