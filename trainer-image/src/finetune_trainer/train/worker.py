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
from finetune_trainer.engine.memory.formatting import gibibytes
from finetune_trainer.engine.world import World, join
from finetune_trainer.failures import OutOfMemory, TrainerError, exit_code, failure_of, recognise
from finetune_trainer.stage import load_run_spec, scratch_folder
from finetune_trainer.storage.heartbeat import Heartbeat
from finetune_trainer.storage.objects import ObjectStore, Stores
from finetune_trainer.supervise import worker_files
from finetune_trainer.train.checkpoint import CheckpointManager
from finetune_trainer.train.loop import train
from finetune_trainer.train.session import Session, open_session
from finetune_trainer.train.startup import StartupClock
from finetune_trainer.train.stopping import raise_if_stopping, releasing
from finetune_trainer.train.telemetry import Telemetry


def main() -> int:
    """Run this process's part; returns its exit code."""
    startup = StartupClock.of_this_process()
    # A crash in native code (a driver, a communication library) says where it was, or nothing does.
    faulthandler.enable()
    # Progress bars of libraries are noise in a log that nobody watches.
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        run_spec = load_run_spec()
        work(join(run_spec.spec), startup)
    except BaseException as error:
        if not isinstance(error, TrainerError):
            traceback.print_exc()
        worker_files.report_failure(error)
        return int(exit_code(failure_of(error)))
    return 0


def work(world: World, startup: StartupClock) -> None:
    """Train as one of a gang."""
    run_spec = load_run_spec()
    stores = Stores(run_spec)
    scratch = scratch_folder()
    checkpointer = CheckpointManager.take(world, stores.default, run_spec, scratch)
    startup.reached("rendezvous")
    telemetry = Telemetry(
        run_spec.run, checkpointer.head.attempt, checkpointer.head.restarts, startup
    )
    if world.is_main:
        telemetry.serve(int(os.environ.get(ENV_METRICS_PORT, METRICS_PORT)))
        telemetry.say(lost_seconds=checkpointer.head.lost_seconds)
    told = worker_files.stop_requested
    with (
        living(world, stores.default, run_spec.run_uri, checkpointer.head.attempt),
        releasing(world, checkpointer, told),
    ):
        session = open_session(
            run_spec,
            stores,
            world,
            checkpointer,
            telemetry,
            scratch,
            partial(raise_if_stopping, world, told),
        )
        try:
            summary = train(session, told)
        except torch.OutOfMemoryError as error:
            raise beside_estimate(error, session) from error
    if world.is_main:
        worker_files.leave_result(summary)
    world.close()


def living(
    world: World, store: ObjectStore, run_uri: str, attempt: int
) -> AbstractContextManager[object]:
    """While it lasts, the attempt is seen to live."""
    return Heartbeat(store, run_uri, attempt) if world.is_main else nullcontext()


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
