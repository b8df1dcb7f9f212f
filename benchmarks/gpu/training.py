"""Training on a GPU compared with TRL: tokens per second, MFU on real tokens, peak memory.

    python benchmarks/gpu/training.py [--shapes 1B 3B] [--rounds 3] [--steps 8]

Random models of the dimensions of Llama 3.2 1B and 3B, documents of log-normal lengths up to 4,096
tokens, bfloat16. Every configuration runs in its own process, so that its peak memory can be
measured. Configurations take turns, round by round. "TRL's best" is TRL's configuration with the
highest median speed. Without a GPU nothing is measured; `--shapes 8M` is a smoke test.
Configurations whose packages (TRL, flash-attn, Liger) are not installed are named and skipped. Each
turn appends a line of JSON to the file that GPU_RESULTS names (``run.py``).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from trainers import SHAPES, Ours, Trl, documents

from finetune_trainer.engine.flops import peak

OURS: dict[str, dict[str, Any]] = {
    "BF16": {"precision": "BF16"},
    "BF16, compiled": {"precision": "BF16", "compile": True},
}
NEEDS: dict[str, tuple[str, ...]] = {
    "TRL packing": ("trl", "datasets"),
    "TRL packing, flash": ("trl", "datasets", "flash_attn"),
    "TRL packing, Liger": ("trl", "datasets", "liger_kernel"),
    "TRL all of it": ("trl", "datasets", "flash_attn", "liger_kernel"),
    "TRL padded": ("trl", "datasets"),
}
"""Modules that a configuration imports."""
TRLS: dict[str, dict[str, Any]] = {
    "TRL packing": {"packing": True},
    "TRL packing, flash": {"packing": True, "attention": "flash_attention_2"},
    "TRL packing, Liger": {"packing": True, "use_liger_kernel": True},
    "TRL all of it": {
        "packing": True,
        "attention": "flash_attention_2",
        "use_liger_kernel": True,
    },
    "TRL padded": {"packing": False},
}


class Turn(NamedTuple):
    """Result of one configuration in one round."""

    speed: float
    """Real tokens per second."""
    memory: float
    """Peak GPU memory, GiB."""
    operations: float
    """Floating-point operations per real token; 0 for TRL."""


def turn(name: str, method: str, shape_name: str, steps: int) -> Turn:
    shape = SHAPES[shape_name]
    data = documents(2000, shape)
    gpu = torch.cuda.is_available()
    trainer: Ours | Trl
    if name in OURS:
        trainer = Ours(method, data, shape, **OURS[name])
    else:
        trainer = Trl(method, "BF16", data, shape, **TRLS[name])
    speed = trainer.turn(steps)
    memory = torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0
    return Turn(speed, memory, trainer.operations() if isinstance(trainer, Ours) else 0.0)


def alone(*arguments: Any) -> Turn | str:
    """Run a round in its own process. Returns its result, or the text of the error."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(turn, *arguments).result()
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["1B", "3B"], choices=list(SHAPES))
    parser.add_argument("--methods", nargs="+", default=["Full", "LoRA"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    if not torch.cuda.is_available() and options.shapes == ["1B", "3B"]:
        print("not measured: there is no GPU here")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = peak(device)
    print(torch.cuda.get_device_name() if device.type == "cuda" else device, versions())
    for shape in options.shapes:
        for method in options.methods:
            measure(shape, method, options.rounds, options.steps, known)


def versions() -> str:
    found = []
    for package in ("torch", "transformers", "trl"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


def lacking(name: str) -> list[str]:
    """Return the modules that a configuration needs and that are not installed."""
    return [module for module in NEEDS.get(name, ()) if find_spec(module) is None]


def tell(**fields: Any) -> None:
    """Append a row to the results file of ``run.py``, if there is one."""
    if path := os.environ.get("GPU_RESULTS"):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(fields) + "\n")


def measure(shape: str, method: str, rounds: int, steps: int, known: float | None) -> None:
    found: dict[str, list[Turn]] = {name: [] for name in (*OURS, *TRLS)}
    for name in list(found):
        if absent := lacking(name):
            print(f"{shape} {method} {name}: skipped, no {', '.join(absent)}", flush=True)
            tell(model=shape, method=method, name=name, said=f"skipped: no {', '.join(absent)}")
            del found[name]
    for number in range(rounds):
        for name, turns in found.items():
            said = alone(name, method, shape, steps)
            fields: dict[str, Any] = {
                "model": shape,
                "method": method,
                "name": name,
                "round": number,
            }
            if isinstance(said, str):
                print(f"{shape} {method} {name}: {said}", flush=True)
                tell(**fields, said=said, outcome="failed")
                continue
            turns.append(said)
            needed = next((t.operations for n in OURS for t in found[n]), 0.0)
            share = f"{said.speed * needed / known:.1%}" if known else "unknown"
            tell(
                **fields,
                tokens_per_second=round(said.speed),
                mfu=share,
                gib=round(said.memory, 2),
            )
    speeds = {n: statistics.median(t.speed for t in turns) for n, turns in found.items() if turns}
    best = max((s for n, s in speeds.items() if n in TRLS), default=0.0)
    needed = next((t.operations for n in OURS for t in found[n]), 0.0)
    for name, speed in speeds.items():
        memory = max(t.memory for t in found[name])
        share = f"{speed * needed / known:.0%}" if known else "unknown"
        ratio = f"{speed / best:.2f}" if best else "-"
        print(f"{shape} {method:5} {name:20}{speed:10.0f} tok/s   MFU {share}"
              f"   {memory:.1f} GiB   to TRL's best {ratio}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
