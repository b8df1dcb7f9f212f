"""The shell of a container's first process: its order in, its last word and exit code out.

``run_stage`` is all of it for prepare and publish; the supervisor of train shares the parts.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal

from finetune_api.names import (
    ENV_RUN_SPEC,
    ENV_SCRATCH,
    ENV_TERMINATION,
    RUN_SPEC_PATH,
    SCRATCH,
    TERMINATION_PATH,
    ExitCode,
    Role,
)
from finetune_api.results import Failure, PreparedSummary, PublishSummary, Termination
from finetune_api.run_spec import RunSpec, parse_run_spec
from finetune_trainer.failures import Interrupted, TrainerError, UserError, exit_code, failure_of

if TYPE_CHECKING:
    from finetune_trainer.storage.objects import Stores

log = logging.getLogger(__name__)

Body = Callable[[RunSpec, "Stores"], PreparedSummary | PublishSummary | None]
"""Does the work of a stage; None: the reduce says what came of a map."""


def run_stage(role: Literal["map", "prepare", "publish"], body: Body) -> int:
    """Runs a stage as the container's first process and returns its exit code.

    SIGTERM ends it at once: publish begins again from nothing, prepare with what is not done.
    """
    from finetune_trainer.storage.objects import (
        Stores,  # a second of imports that the supervisor is spared
    )

    start_log()
    run = ""

    def stop(number: int, frame: FrameType | None) -> None:
        # Threads may be busy in libraries: nothing is waited for.
        word = Interrupted("Interrupted", f"{role} was stopped by {signal.Signals(number).name}")
        os._exit(end_badly(run, role, word))

    before = signal.signal(signal.SIGTERM, stop)
    try:
        run_spec = load_run_spec()
        run = run_spec.run
        log.info("%s of run %s of %s/%s", role, run, run_spec.job.namespace, run_spec.job.name)
        summary = body(run_spec, Stores(run_spec))
    except (Exception, KeyboardInterrupt) as error:
        return end_badly(run, role, error)
    finally:
        signal.signal(signal.SIGTERM, before)
    said = {"published" if role == "publish" else "prepared": summary}
    leave_termination(Termination.model_validate({"run": run, "role": role, **said}))
    log.info("%s: done", role)
    return int(ExitCode.OK)


def load_run_spec() -> RunSpec:
    """The order of this container.

    Raises:
        UserError: 'RunSpecMissing'.
        InvalidSpec: where it is no run spec, or one of another contract version.
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
    """Where this container may write."""
    return Path(os.environ.get(ENV_SCRATCH) or SCRATCH)


def leave_termination(said: Termination) -> None:
    """Writes the container's last word. It is an answer to who started it, not the work itself:
    where it cannot be written, that is logged."""
    path = Path(os.environ.get(ENV_TERMINATION) or TERMINATION_PATH)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In place: in a pod the file is a mount of the kubelet's, which nothing can be renamed to.
        path.write_text(said.to_text(), encoding="utf-8")
    except OSError as error:
        log.error("cannot write the termination message %s: %s", path, error)


def end_badly(run: str, role: Role, error: BaseException) -> int:
    """Says why a stage failed, to people and to the operator; returns the exit code."""
    failure = failure_of(error)
    if not isinstance(error, TrainerError):
        log.error("%s failed", role, exc_info=error)
    return end_with(run, role, failure)


def end_with(run: str, role: Role, failure: Failure) -> int:
    """As ``end_badly``, for a verdict that is known already."""
    leave_termination(Termination(run=run, role=role, failure=failure))
    log.error("%s: %s (%s): %s", role, failure.failure_class, failure.reason, failure.message)
    return int(exit_code(failure))


def start_log() -> None:
    """Log lines of this process: time, level, words, to standard error."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
