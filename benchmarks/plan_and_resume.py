"""Time to the first step of a plan, from the beginning and from the middle of a run.

    python benchmarks/plan_and_resume.py [--samples 10000 1000000 10000000]

Each figure is a process of its own: the plan is made from the index and gives its step, as every
process of a gang does when it starts. A resumed run must not wait longer the further it had come.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from finetune_trainer.engine.mixture import Stage
from finetune_trainer.engine.plan import Plan

BATCH = 256
EPOCHS = 3
MIXTURES = {"one set": None, "three sets, weighted": [0.6, 0.3, 0.1]}


def first_step(samples: int, mixture: str, done: float) -> tuple[float, float]:
    """Seconds until a plan has given its step at a part of the run, and the most memory that the
    process held, in MiB."""
    lengths = np.random.default_rng(0).integers(16, 2048, samples).astype(np.int32)
    shares = MIXTURES[mixture]
    sources = np.arange(samples) % len(shares or [1])
    began = time.perf_counter()
    plan = Plan(
        lengths, lengths // 2, batch_size=BATCH, seed=0, row_tokens=2048, ranks=8,
        sources=sources, stages=[Stage(0, shares)], visits=EPOCHS * samples,
    )  # fmt: skip
    plan.step(int(done * EPOCHS * samples / BATCH))
    took = time.perf_counter() - began
    return took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, nargs="+", default=[10_000, 1_000_000, 10_000_000])
    options = parser.parse_args()
    positions = (0.0, 0.5, 0.99)
    heads = "".join(f"{f'at {p:.0%}, s':>12}" for p in positions)
    print(f"{'samples':>12}  {'mixture':22}{heads}{'most MiB':>12}")
    for samples in options.samples:
        for mixture in MIXTURES:
            figures = []
            for done in positions:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                    figures.append(alone.submit(first_step, samples, mixture, done).result())
            times = "".join(f"{took:12.3f}" for took, _ in figures)
            memory = max(held for _, held in figures)
            print(f"{samples:12,}  {mixture:22}{times}{memory:12.0f}", flush=True)


if __name__ == "__main__":
    main()
