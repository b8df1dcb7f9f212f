"""Training throughput by how OpenMP's threads wait, alone and beside a process that keeps one core
busy.

    python benchmarks/busy_neighbour.py [--rounds 5] [--steps 4] [--micro-batch-tokens 1024]

Training has as many threads as there are cores. Each setting has its own process, because OpenMP
reads its settings once. All processes are built first and then take turns. Speeds are medians over
the rounds; ratios are medians of each round's ratio.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Final

from finetune_trainer.adaptive_spinning import AdaptiveSpinning
from finetune_trainer.threads import count_cores, thread_environment

CORES: Final = count_cores()
SPINNING: Final = "spinning"
ADAPTIVE: Final = "adaptive (ours)"
SETTINGS: Final[Mapping[str, Mapping[str, str]]] = {
    SPINNING: {"OMP_NUM_THREADS": str(CORES)},
    ADAPTIVE: thread_environment({}, cores=CORES, adaptive=True),
    "passive": thread_environment({}, cores=CORES),
    "a thread fewer": {"OMP_NUM_THREADS": str(max(1, CORES - 1))},
}


def work(tokens: int, adaptive: bool, commands: Connection) -> None:
    """Train as many steps as each command says and reply with tokens per second, until it is 0."""
    from trainers import SHAPES, Ours, documents

    shape = replace(SHAPES["8M"], micro_batch_tokens=tokens, micro_batches=1)
    training = Ours("Full", documents(500, shape), shape, precision="BF16")
    while steps := commands.recv():
        with AdaptiveSpinning() if adaptive else nullcontext():
            commands.send(training.turn(steps))


def started(name: str, tokens: int) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(tokens, name == ADAPTIVE, theirs))
    before = dict(os.environ)
    os.environ.update(SETTINGS[name])
    process.start()
    os.environ.clear()
    os.environ.update(before)
    return process, ours


def turn(commands: Connection, steps: int, busy: bool) -> float:
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        commands.send(steps)
        speed: float = commands.recv()
    finally:
        if neighbour is not None:
            neighbour.kill()
            neighbour.wait()
    return speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--micro-batch-tokens", type=int, default=1024, help="tokens of a step")
    options = parser.parse_args()
    trainings = {name: started(name, options.micro_batch_tokens) for name in SETTINGS}
    alone: dict[str, list[float]] = {name: [] for name in SETTINGS}
    beside: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for _, commands in trainings.values():
        turn(commands, 1, busy=False)
    for _ in range(options.rounds):
        for busy, speeds in ((False, alone), (True, beside)):
            for name, (_, commands) in trainings.items():
                speeds[name].append(turn(commands, options.steps, busy))
    for process, commands in trainings.values():
        commands.send(0)
        process.join()
    print(f"{CORES} cores; other load of the machine: {os.getloadavg()[0]:.1f}")
    print(f"{'':22} {'alone':>7} {'beside':>7} {'beside/alone':>13} {'alone/spinning':>15}")
    for name in SETTINGS:
        kept = statistics.median(b / a for a, b in zip(alone[name], beside[name], strict=True))
        cost = statistics.median(a / s for a, s in zip(alone[name], alone[SPINNING], strict=True))
        one, two = statistics.median(alone[name]), statistics.median(beside[name])
        print(f"{name:22} {one:7.0f} {two:7.0f} {kept:13.2f} {cost:15.3f}")


if __name__ == "__main__":
    main()
