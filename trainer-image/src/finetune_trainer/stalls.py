"""The end of a process that has stalled, and what it leaves in storage, to find the cause.

<run>/stacks/<process>.txt               Python stacks of all threads, then native ones (py-spy)
<run>/stacks/<process>-collectives.json  torch's flight recorder: the last collectives of NCCL
                                         or gloo. The others wait for the rank whose last
                                         sequence number is the lowest.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, NoReturn

from finetune_api.run_spec import RunSpec
from finetune_trainer.failures import Stalled
from finetune_trainer.liveness import StallWatch
from finetune_trainer.storage.objects import ObjectStore

EVIDENCE_SECONDS: Final = 20.0
"""Time to write what a stalled process leaves."""
_PY_SPY_SECONDS: Final = 10.0
_PR_SET_PTRACER: Final = 0x59616D61
_ANY_PROCESS: Final = ctypes.c_ulong(-1)


def stall_watch(
    run_spec: RunSpec,
    store: ObjectStore,
    scratch: Path,
    process: str,
    report: Callable[[Stalled], int],
    *,
    limit: float | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> StallWatch:
    """Return a context that ends this process if it makes no progress.

    Args:
        process: name of this process among those of the run, in words joined by hyphens.
        report: reports the failure and returns the exit code.
        limit: seconds without a sign of progress; None: see ``liveness.stall_limit``.
        stop_requested: whether this process was requested to stop.
    """

    def end(idle: float, stacks: Path) -> NoReturn:
        folder = f"{run_spec.run_uri}/stacks"
        uri = f"{folder}/{process}.txt"
        who = process.replace("-", " ")
        error = Stalled("NoProgress", f"{who} made no progress for {idle:.0f} s: {uri}")
        code = report(error)

        def leave() -> None:
            text = _stacks(stacks)
            print(f"{error.message}\n{text}", file=sys.stderr, flush=True)
            store.put(uri, text.encode())
            if collectives := _collectives():
                store.put(f"{folder}/{process}-collectives.json", collectives)

        # Storage, or the reader of the log, may be what hangs: wait for them only so long.
        leaver = threading.Thread(target=leave, daemon=True)
        leaver.start()
        leaver.join(EVIDENCE_SECONDS)
        os._exit(code)

    scratch.mkdir(parents=True, exist_ok=True)
    return StallWatch(limit, scratch / f"stacks-{process}.txt", end, stop_requested)


def _stacks(file: Path) -> str:
    python = file.read_text() if file.exists() else "no stacks: the disk failed\n"
    return python + _native_stacks()


def _native_stacks() -> str:
    """Return the stacks with the frames of native code, or why there are none."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if sys.platform != "linux" or (command := shutil.which("py-spy", path=places)) is None:
        return "\nno native stacks: py-spy is not installed, or this is not Linux\n"
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _ANY_PROCESS, 0, 0, 0)  # else a child may not look
    try:
        done = subprocess.run(
            [command, "dump", "--native", f"--pid={os.getpid()}"],
            capture_output=True,
            text=True,
            timeout=_PY_SPY_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"\nno native stacks: {error}\n"
    return f"\nWith native frames:\n{done.stdout or done.stderr}"


def _collectives() -> bytes:
    """Return the flight recorder's JSON; empty if this process is in no process group."""
    if (distributed := sys.modules.get("torch.distributed")) is None:
        return b""
    if not (distributed.is_available() and distributed.is_initialized()):
        return b""
    from torch._C import _distributed_c10d as recorder

    backend = "nccl" if "nccl" in distributed.get_backend() else "gloo"
    return bytes(recorder._dump_fr_trace_json(True, False, backend))
