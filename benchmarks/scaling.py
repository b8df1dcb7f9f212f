"""Tokens per second of one and of two training processes on this machine, one core each.

    python benchmarks/scaling.py [--rounds 3] [--steps 4]

Both train the same steps, because the global batch is the same. The result is the speed of two
processes divided by that of one (at most 2). One and two processes take turns.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
from multiprocessing.queues import Queue

from trainers import SHAPES, Ours, documents


def work(rank: int, size: int, port: int, steps: int, said: Queue[float]) -> None:
    """Train as one process of the world; rank 0 reports the tokens per second of the world."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    shape = SHAPES["8M"]
    speed = Ours("Full", documents(2000, shape), shape, precision="BF16").turn(steps)
    if rank == 0:
        said.put(speed)


def speed_of(size: int, steps: int) -> float:
    context = multiprocessing.get_context("spawn")
    said: Queue[float] = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        context.Process(target=work, args=(rank, size, port, steps, said)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    speed = said.get(timeout=600)
    for process in processes:
        process.join()
    return speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    # Read when the spawned processes load torch. After torch.set_num_threads(1), operators in other
    # threads would still use all cores.
    os.environ["OMP_NUM_THREADS"] = "1"
    pairs = [
        (speed_of(1, options.steps), speed_of(2, options.steps)) for _ in range(options.rounds)
    ]
    one, two = (statistics.median(x) for x in zip(*pairs, strict=True))
    ratios = [b / a for a, b in pairs]
    shown = " ".join(f"{r:.2f}" for r in ratios)
    print(f"1 process {one:.0f} tok/s, 2 processes {two:.0f} tok/s,"
          f" ratio {statistics.median(ratios):.2f} ({shown})")  # fmt: skip


if __name__ == "__main__":
    main()
