"""A training process.

Joins the process group, claims the run, trains, and writes its summary or failure to a file for the
supervisor.
"""

from __future__ import annotations

import faulthandler
import os
import traceback
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import transformers

from finetune_api.names import ENV_METRICS_PORT, METRICS_PORT
from finetune_api.run_spec import RunSpec
from finetune_trainer.adaptive_spinning import AdaptiveSpinning
from finetune_trainer.engine.memory.formatting import gibibytes
from finetune_trainer.engine.world import World, join
from finetune_trainer.failures import (
    OutOfMemory,
    Stalled,
    TrainerError,
    exit_code,
    failure_of,
    recognise,
)
from finetune_trainer.stage import load_run_spec, scratch_folder
from finetune_trainer.stalls import stall_watch
from finetune_trainer.storage.heartbeat import Heartbeat
from finetune_trainer.storage.objects import ObjectStore, Stores
from finetune_trainer.supervise import worker_files
from finetune_trainer.threads import adapts
from finetune_trainer.train.checkpoint import CheckpointManager
from finetune_trainer.train.loop import train
from finetune_trainer.train.session import MeasuringSession, Session, open_session
from finetune_trainer.train.startup import StartupClock
from finetune_trainer.train.stopping import raise_if_stopping, releasing
from finetune_trainer.train.telemetry import Telemetry
from finetune_trainer.train.time_recorder import TimeFile, TimeRecorder
from finetune_trainer.train.untrained import evaluate_alone


def main() -> int:
    """Run the training process and return its exit code."""
    startup, recorder = StartupClock.of_this_process(), TimeRecorder.of_this_process()
    # Dump the Python stack on a crash in native code (driver, communication library).
    faulthandler.enable()
    # Progress bars only clutter a log file.
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        run_spec = load_run_spec()
        work(run_spec, join(run_spec.spec), startup, recorder)
    except BaseException as error:
        if not isinstance(error, TrainerError):
            traceback.print_exc()
        worker_files.report_failure(error)
        return int(exit_code(failure_of(error)))
    return 0


def work(run_spec: RunSpec, world: World, startup: StartupClock, recorder: TimeRecorder) -> None:
    """Claim the run and train as one rank of a process group."""
    stores = Stores(run_spec)
    scratch = scratch_folder()
    checkpointer = CheckpointManager.take(world, stores.default, run_spec, scratch, recorder)
    startup.reached("rendezvous")
    telemetry = Telemetry(
        run_spec.run, checkpointer.head.attempt, checkpointer.head.restarts, startup, recorder.use
    )
    if world.is_main:
        telemetry.serve(int(os.environ.get(ENV_METRICS_PORT, METRICS_PORT)))
        telemetry.say(nodes=world.nodes)
    stop_requested = worker_files.stop_requested
    with (
        time_file_of(world, recorder),
        heartbeat_of(world, stores.default, run_spec.run_uri, checkpointer),
        releasing(world, checkpointer, stop_requested),
        spinning_of(world),
        stall_watch(
            run_spec,
            stores.default,
            scratch,
            f"attempt-{checkpointer.head.attempt}-rank-{world.rank}",
            report_stall,
            limit=run_spec.spec.failure_policy.progress_deadline_seconds,
            stop_requested=stop_requested,
        ),
    ):
        session = open_session(
            run_spec,
            stores,
            world,
            checkpointer,
            telemetry,
            scratch,
            partial(raise_if_stopping, world, stop_requested),
        )
        try:
            if isinstance(session, Session):
                summary = train(session, stop_requested)
            else:
                summary = evaluate_alone(session, stop_requested)
        except torch.OutOfMemoryError as error:
            raise beside_estimate(error, session) from error
    if world.is_main:
        worker_files.leave_result(summary)
    world.close()


def time_file_of(world: World, recorder: TimeRecorder) -> AbstractContextManager[object]:
    """Return a context in which rank 0 writes its account of the time for the supervisor."""
    return TimeFile(recorder) if world.is_main else nullcontext()


def heartbeat_of(
    world: World, store: ObjectStore, run_uri: str, checkpointer: CheckpointManager
) -> AbstractContextManager[object]:
    """Return a context in which rank 0 writes the heartbeat of the attempt."""
    if not world.is_main:
        return nullcontext()
    return Heartbeat(store, run_uri, checkpointer.head.attempt, use=checkpointer.recorder.use)


def report_stall(error: Stalled) -> int:
    """Report to the supervisor that this process has stalled; return the exit code."""
    worker_files.report_failure(error)
    return int(Stalled.exit_code)


def spinning_of(world: World) -> AbstractContextManager[object]:
    """Return a context that adapts how the threads of a CPU process wait for each other."""
    several = world.device.type == "cpu" and torch.get_num_threads() > 1
    return AdaptiveSpinning() if several and adapts(os.environ) else nullcontext()


def beside_estimate(error: torch.OutOfMemoryError, session: MeasuringSession) -> TrainerError:
    """Return an out-of-memory failure with the memory estimate added to its message."""
    known, memory = recognise(error), session.memory
    sizes = f"{gibibytes(memory.needed)} of {gibibytes(memory.available or 0)}"
    expected = memory.warning or f"The estimate was {sizes} ({memory.placement})"
    return OutOfMemory(known.reason, f"{known.message}. {expected}")
