"""One process of a training gang, as torchrun starts it.

It takes its place in the gang, takes the run, trains, and leaves its summary or its failure in a
file for the supervisor.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import traceback
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import transformers

from finetune_api.names import ENV_METRICS_PORT, METRICS_PORT
from finetune_trainer.engine.gang import Gang, join
from finetune_trainer.engine.memory.words import gibibytes
from finetune_trainer.failures import OutOfMemory, TrainerError, exit_code, recognise, verdict
from finetune_trainer.stage import load_order, scratch_folder
from finetune_trainer.storage.objects import ObjectStore, Stores
from finetune_trainer.storage.seen import Heartbeat
from finetune_trainer.supervise import workerfiles
from finetune_trainer.train.checkpoint import Checkpoints
from finetune_trainer.train.loop import train
from finetune_trainer.train.session import Session, open_session
from finetune_trainer.train.startup import StartupClock
from finetune_trainer.train.stopping import heed, releasing
from finetune_trainer.train.telemetry import Telemetry


def main() -> int:
    """Run this process's part; returns its exit code."""
    startup = StartupClock.of_this_process()
    # A crash in native code (a driver, a communication library) says where it was, or nothing does.
    faulthandler.enable()
    # Progress bars of libraries are noise in a log that nobody watches.
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        order = load_order()
        work(join(order.spec.training), startup)
    except BaseException as error:
        if not isinstance(error, TrainerError):
            traceback.print_exc()
        workerfiles.report_failure(error)
        return int(exit_code(verdict(error)))
    return 0


def work(gang: Gang, startup: StartupClock) -> None:
    """Train as one of a gang."""
    order = load_order()
    stores = Stores(order)
    scratch = scratch_folder()
    checkpoints = Checkpoints.take(gang, stores.default, order, scratch)
    startup.reached("gang")
    telemetry = Telemetry(order.run, checkpoints.head.attempt, checkpoints.head.restarts, startup)
    if gang.first:
        telemetry.serve(int(os.environ.get(ENV_METRICS_PORT, METRICS_PORT)))
        telemetry.say(lost_seconds=checkpoints.head.lost_seconds)
    told = workerfiles.stop_requested
    with (
        living(gang, stores.default, order.run_uri, checkpoints.head.attempt),
        releasing(gang, checkpoints, told),
    ):
        session = open_session(
            order, stores, gang, checkpoints, telemetry, scratch, partial(heed, gang, told)
        )
        try:
            summary = train(session, told)
        except torch.OutOfMemoryError as error:
            raise beside_estimate(error, session) from error
    if gang.first:
        workerfiles.leave_result(summary)
    gang.close()


def living(
    gang: Gang, store: ObjectStore, run_uri: str, attempt: int
) -> AbstractContextManager[object]:
    """While it lasts, the attempt is seen to live."""
    return Heartbeat(store, run_uri, attempt) if gang.first else nullcontext()


def beside_estimate(error: torch.OutOfMemoryError, session: Session) -> TrainerError:
    """The verdict on memory that did not suffice, with what was expected."""
    known, memory = recognise(error), session.memory
    sizes = f"{gibibytes(memory.needed)} of {gibibytes(memory.room or 0)}"
    expected = memory.warning or f"Estimated were {sizes} ({memory.placement})"
    return OutOfMemory(known.reason, f"{known.message}. {expected}")


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # A gang that broke leaves threads that wait for peers; nothing is left to clean up.
    os._exit(code)
