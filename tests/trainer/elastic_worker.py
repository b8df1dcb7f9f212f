"""Training processes under real supervisors that start at once.

What torchrun starts is a small process that stands for one forked from a server with torch
imported. Each of the two ends with the other.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from worlds import forked

STUB = """
import json, os, socket
def main():
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(os.environ["FORKS"])
        line.sendall(json.dumps(dict(os.environ)).encode() + b"\\n")
        return int(line.recv(8) or 137)
"""
"""Module that torchrun runs."""


class ForkedWorkers:
    """Answers stubs by forked training processes, until closed."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                line, _ = self._listener.accept()
            except OSError:
                return
            with line, line.makefile("rb") as words:
                forked(work, json.loads(words.readline()), line)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def work(environment: dict[str, str], line: socket.socket) -> None:
    """Train as the stub at the other end of ``line``; tell it the exit code."""
    os.environ.clear()
    os.environ.update(environment)
    log = os.open(environment["LOG"], os.O_APPEND | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    threading.Thread(target=_end_with, args=(line,), daemon=True).start()
    import torch

    torch.set_num_threads(1)
    from finetune_trainer.train import loop, worker

    loop.optimizer_step = recorded(loop.optimizer_step)
    code = worker.main()
    line.sendall(str(code).encode())
    os._exit(code)


def _end_with(line: socket.socket) -> None:
    """End this process without warning when the stub has ended."""
    line.recv(1)
    os._exit(137)


def recorded(optimizer_step: Callable[..., Any]) -> Callable[..., Any]:
    """Return an optimizer step that first waits while the test holds the gang, unless another node
    waits to join, and then writes the samples that it trains."""
    from finetune_trainer.supervise.worker_files import grow_requested

    shared = Path(os.environ["SHARED"])

    def step(session: Any, batch: Any, rate: float) -> Any:
        number, rank, size = batch.plan.number, session.world.rank, session.world.size
        while number >= int((shared / "hold").read_text()) and not grow_requested():
            (shared / f"held-{size}").touch()
            time.sleep(0.02)
        samples = [sample for micro in batch.plan.micro_batches[rank] for sample in micro]
        attempt = session.checkpointer.head.attempt
        with (shared / f"trained-{attempt}-{rank}").open("a") as file:
            file.write(json.dumps([number, size, samples]) + "\n")
        return optimizer_step(session, batch, rate)

    return step
