"""Training speed compared with TRL's SFTTrainer: same model, data, tokens per step and precision.

    python benchmarks/tokens_per_second.py [--rounds 2] [--steps 4] [--precision BF16 FP32]
                                           [--method Full LoRA] [--beside packing padded]

Ours, TRL with packing, and TRL with its defaults (padded) take turns in one process. The figure to
quote is the ratio of speeds (median over the rounds). Also printed: our operations on real tokens
per second as a share of the machine's matrix-multiply rate, and the peak memory of each above the
memory of its process at the start (each in its own process).
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from trainers import SHAPES, Ours, Trl, documents, matmul_rate

SHAPE = SHAPES["8M"]
CPU = torch.device("cpu")


def trainer(name: str, method: str, precision: str) -> Any:
    data = documents(2000, SHAPE)
    if name == "ours":
        return Ours(method, data, SHAPE, precision=precision)
    return Trl(method, precision, data, SHAPE, packing=name == "packing")


@dataclass(frozen=True)
class Turns:
    """Speeds of all trainers in one process."""

    speeds: list[tuple[float, ...]]
    """Tokens per second by round, ours first."""
    share: float
    """Our operations per second over the machine's matrix-multiply rate."""


def take_turns(names: list[str], method: str, precision: str, rounds: int, steps: int) -> Turns:
    all_ = [trainer(name, method, precision) for name in names]
    speeds = [tuple(one.turn(steps) for one in all_) for _ in range(rounds)]
    rate = matmul_rate(torch.bfloat16 if precision == "BF16" else torch.float32, CPU)
    ours = statistics.median(speed[0] for speed in speeds)
    return Turns(speeds, ours * all_[0].operations() / rate)


def memory(name: str, method: str, precision: str) -> float:
    """Return the peak memory over two steps, in MiB above the memory before."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trainer(name, method, precision).turn(1)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of a function, run in its own process: precision is process-wide state."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--precision", nargs="+", default=["BF16", "FP32"])
    parser.add_argument("--method", nargs="+", default=["Full", "LoRA"])
    parser.add_argument("--beside", nargs="+", default=["packing", "padded"])
    options = parser.parse_args()
    names = ["ours", *options.beside]
    packages = ("torch", "transformers", "trl", "peft")
    print(", ".join(f"{p} {version(p)}" for p in packages), f"; {torch.get_num_threads()} threads")
    print("tokens/s of", ", TRL ".join(names) + "; ours to theirs; memory in MiB, same order")
    for precision in options.precision:
        for method in options.method:
            turns = alone(take_turns, names, method, precision, options.rounds, options.steps)
            peaks = [alone(memory, name, method, precision) for name in names]
            show(names, method, precision, turns, peaks)


def show(names: list[str], method: str, precision: str, turns: Turns, peaks: list[float]) -> None:
    speeds = [statistics.median(x) for x in zip(*turns.speeds, strict=True)]
    line = f"{method:6}{precision:6}" + "".join(f"{s:8.0f}" for s in speeds)
    for i, name in enumerate(names[1:], start=1):
        ratios = [speed[0] / speed[i] for speed in turns.speeds]
        shown = " ".join(f"{r:.2f}" for r in ratios)
        line += f"   {name} {statistics.median(ratios):.2f} ({shown})"
    line += f"   matmul share {turns.share:.0%}   memory " + " ".join(f"{p:.0f}" for p in peaks)
    print(line, flush=True)


if __name__ == "__main__":
    main()
