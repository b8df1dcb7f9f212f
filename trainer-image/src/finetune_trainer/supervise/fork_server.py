"""Processes of a node, forked from a server that has imported what they need.

    supervisor ──► fork server: imports torch, transformers, peft once per pod
                      ├─fork─► agent (torchrun)        for each start of the workers
                      └─fork─► training processes      as the agent asks for them

The imports take several seconds of CPU time and hundreds of MB in every process. A restart in place
pays for neither, and the processes of a pod share the memory. The server is the one of Python's
multiprocessing, which torchrun can use too. It must not initialize CUDA: a forked process cannot
use CUDA then.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from typing import Any, Final

from finetune_trainer.supervise.processes import descendants

_FORKS: Final = sys.platform == "linux" and sys.version_info < (3, 14)
METHOD: Final = "forkserver" if _FORKS else "spawn"
"""Start method of multiprocessing. Frameworks of macOS do not survive a fork; since Python 3.14,
forked processes cannot use the server that forked them."""
_PR_SET_NAME: Final = 15


def set_up(preload: str, environment: Mapping[str, str]) -> None:
    """Set what the server imports and the environment variables of all its processes.

    Args:
        preload: module that imports what the processes need, and starts no threads.
        environment: added to this process's own. Libraries read variables when they are loaded.
    """
    os.environ.update(environment)
    # Libraries ask for GPUs when they are imported: torch then asks NVML, which survives a fork.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    multiprocessing.forkserver.set_forkserver_preload([preload])
    helpers()


def helpers() -> set[int]:
    """Make sure that the server runs; return the processes of multiprocessing. Call while no
    process of ``start`` runs."""
    if _FORKS:
        multiprocessing.forkserver.ensure_running()
    return set(descendants(os.getpid()))


def _runs() -> None:
    """The server runs: it has forked this process."""


def start(target: Callable[..., None], *arguments: object) -> BaseProcess:
    """Start a process that calls a function of a module; return it. Keep the result: the process
    ends with the object (``begin_process``)."""
    context: Any = multiprocessing.get_context(METHOD)
    process: BaseProcess = context.Process(target=target, args=arguments)
    process.start()
    return process


def begin_process(name: str, environment: Mapping[str, str], end: signal.Signals) -> None:
    """Begin the work of a forked process: its name in ``ps``, its environment variables, a session
    of its own (Ctrl-C in a terminal is for the supervisor), and the end with the process that asked
    for it.

    Args:
        name: at most 15 characters.
        end: signal that this process receives when that process has ended.
    """
    os.environ.update(environment)
    # The server's objects live to the end: a scan of them would only copy their memory pages.
    gc.freeze()
    os.setsid()
    if _FORKS:
        # A forked process would otherwise start a server of its own, and import everything again.
        multiprocessing.forkserver._forkserver.ensure_running = _runs  # type: ignore[method-assign]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode())
    parent = multiprocessing.parent_process()
    assert parent is not None, "called in a process of multiprocessing only"

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), end)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
