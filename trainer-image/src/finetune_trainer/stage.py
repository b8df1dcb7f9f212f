"""Entry point of a container: reads the run spec, writes the termination message and exit code.

``run_stage`` wraps prepare and publish. The supervisor of train uses the other functions.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal

from finetune_api.names import (
    ENV_RUN_SPEC,
    ENV_SCRATCH,
    ENV_TERMINATION,
    ENV_WORKER,
    RUN_SPEC_PATH,
    SCRATCH,
    TERMINATION_PATH,
    ExitCode,
    Role,
)
from finetune_api.results import Failure, PreparedSummary, PublishSummary, Termination
from finetune_api.run_spec import RunSpec, parse_run_spec
from finetune_api.time_use import TimeUse
from finetune_trainer.failures import Interrupted, TrainerError, UserError, exit_code, failure_of
from finetune_trainer.optional_packages import hide_unused

if TYPE_CHECKING:
    from finetune_trainer.storage.objects import Stores

log = logging.getLogger(__name__)

Body = Callable[[RunSpec, "Stores"], PreparedSummary | PublishSummary | None]
"""The work of a stage. A map returns None: the reduce reports the summary."""


def run_stage(role: Literal["map", "prepare", "publish"], body: Body) -> int:
    """Run a stage as the container's main process and return its exit code.

    SIGTERM ends it immediately: a retry of publish starts from scratch, a retry of prepare skips
    finished input splits.
    """
    # Imported here to save the supervisor a second of imports.
    from finetune_trainer.stalls import stall_watch
    from finetune_trainer.storage.objects import Stores

    start_log()
    run = ""

    def stop(number: int, frame: FrameType | None) -> None:
        # Exit without joining threads: they may be blocked in libraries.
        word = Interrupted("Interrupted", f"{role} was stopped by {signal.Signals(number).name}")
        os._exit(end_badly(run, role, word))

    before = signal.signal(signal.SIGTERM, stop)
    try:
        run_spec = load_run_spec()
        run = run_spec.run
        hide_unused(run_spec.spec)
        log.info("%s of run %s of %s/%s", role, run, run_spec.job.namespace, run_spec.job.name)
        stores = Stores(run_spec)
        process = role if role != "map" else f"map-{os.environ.get(ENV_WORKER, '0')}"
        report = partial(end_badly, run, role)
        with stall_watch(run_spec, stores.default, scratch_folder(), process, report):
            summary = body(run_spec, stores)
    except (Exception, KeyboardInterrupt) as error:
        return end_badly(run, role, error)
    finally:
        signal.signal(signal.SIGTERM, before)
    said = {"published" if role == "publish" else "prepared": summary}
    leave_termination(Termination.model_validate({"run": run, "role": role, **said}))
    log.info("%s: done", role)
    return int(ExitCode.OK)


def load_run_spec() -> RunSpec:
    """Read the run spec of this container.

    Raises:
        UserError: 'RunSpecMissing' if the file cannot be read or is not JSON.
        InvalidSpec: if it is not a run spec, or has another contract version.
    """
    path = Path(os.environ.get(ENV_RUN_SPEC) or RUN_SPEC_PATH)
    try:
        return parse_run_spec(path.read_bytes())
    except OSError as error:
        raise UserError(
            "RunSpecMissing",
            f"cannot read the run spec {path}: {error.strerror}. Pods of the operator have it"
            " mounted; on one machine use `finetune run job.yaml`",
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError("RunSpecMissing", f"{path} is not JSON: {error}") from None


def scratch_folder() -> Path:
    """Return the folder that this container may write to."""
    return Path(os.environ.get(ENV_SCRATCH) or SCRATCH)


def leave_termination(said: Termination) -> None:
    """Write the termination message. A failure to write it is only logged: the message reports the
    work and is not part of it."""
    path = Path(os.environ.get(ENV_TERMINATION) or TERMINATION_PATH)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Write in place: in a pod the file is a bind mount, which cannot be a target of rename.
        path.write_text(said.to_text(), encoding="utf-8")
    except OSError as error:
        log.error("cannot write the termination message %s: %s", path, error)


def end_badly(run: str, role: Role, error: BaseException) -> int:
    """Log and report a stage's failure in the termination message; return the exit code."""
    failure = failure_of(error)
    if not isinstance(error, TrainerError):
        log.error("%s failed", role, exc_info=error)
    return end_with(run, role, failure)


def end_with(run: str, role: Role, failure: Failure, time: TimeUse | None = None) -> int:
    """Like ``end_badly``, for a known failure, and with what is known of the training's time."""
    leave_termination(Termination(run=run, role=role, failure=failure, time=time))
    log.error("%s: %s (%s): %s", role, failure.failure_class, failure.reason, failure.message)
    return int(exit_code(failure))


def start_log() -> None:
    """Configure logging to standard error: time, level, message."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
