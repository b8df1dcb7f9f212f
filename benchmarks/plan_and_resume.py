"""Time to the first step of a plan, at the start of a run and after a resume.

    python benchmarks/plan_and_resume.py [--samples 10000 1000000 10000000]
                                         [--stored 10000 1000000]

Each figure is measured in its own process. The first table builds the plan from lengths and
computes one step, as every training process does at its start. "from S3" reads manifest, index and
shards from a local S3 server into an empty folder until the first batch is on the device (the CPU),
as in a pod on a new node; samples have 16 to 256 tokens, in shards of the default size. The time
must not grow with the step at which a run resumes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from finetune_trainer.engine.planning.mixture import Stage
from finetune_trainer.engine.planning.plan import Plan

# Modules that read storage or make tensors are imported inside functions, so that the plan's memory
# is measured without them.

BATCH = 256
EPOCHS = 3
ROW_TOKENS = 2048
LONGEST_STORED = 256
BUCKET = "bench"
MIXTURES = {"one set": None, "three sets, weighted": [0.6, 0.3, 0.1]}


def first_step(samples: int, mixture: str, done: float) -> tuple[float, float]:
    """Return the seconds until a plan has computed the step at fraction ``done`` of the run, and
    the peak memory of the process in MiB."""
    lengths = np.random.default_rng(0).integers(16, ROW_TOKENS, samples).astype(np.int32)
    shares = MIXTURES[mixture]
    sources = np.arange(samples) % len(shares or [1])
    began = time.perf_counter()
    plan = plan_of(lengths, lengths // 2, 8, sources, [Stage(0, shares)])
    plan.step(step_at(samples, done))
    took = time.perf_counter() - began
    return took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def plan_of(lengths: Any, supervised: Any, ranks: int, sources: Any, stages: list[Stage]) -> Plan:
    return Plan(
        lengths, supervised, batch_size=BATCH, seed=0, micro_batch_tokens=ROW_TOKENS, ranks=ranks,
        sources=sources, stages=stages, visits=EPOCHS * len(lengths),
    )  # fmt: skip


def step_at(samples: int, done: float) -> int:
    return int(done * EPOCHS * samples / BATCH)


def first_batch(endpoint: str, keys: Any, uri: str, done: float) -> tuple[float, int]:
    """Return the seconds from an empty folder to the first batch of a single process, at fraction
    ``done`` of the run, and the number of shards fetched by then."""
    import torch

    from finetune_trainer.engine.packing.feed import Feed
    from finetune_trainer.prepared.dataset import PreparedData
    from finetune_trainer.storage.objects import ObjectStore

    store = ObjectStore(endpoint, credentials=keys)
    store.head(f"{uri}/nothing.json")  # the first request of a client takes seconds
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        data = PreparedData.open(store, uri, Path(folder))
        index = data.index("train")
        plan = plan_of(index.length, index.supervised, 1, index.set, [Stage(0)])
        start = step_at(len(index), done)
        feed = Feed(
            plan, lambda positions: data.samples("train", positions), rank=0, start=start,
            end=start + 1, device=torch.device("cpu"),
        )  # fmt: skip
        with feed:
            next(iter(feed))
        took = time.perf_counter() - began
        return took, len(list(Path(folder).glob("*/shards/*.arrow")))


def made_up(samples: int) -> Iterator[tuple[Any, Any]]:
    """Yield random samples whose second half is supervised."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 32_000, LONGEST_STORED + 4096).astype(np.int32)
    for length, at in zip(
        draw.integers(16, LONGEST_STORED, samples).tolist(),
        draw.integers(0, 4096, samples).tolist(),
        strict=True,
    ):
        yield tokens[at : at + length], ((length // 2, length),)


def measure_stored(counts: list[int], positions: tuple[float, ...]) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "trainer"))
    from prepared_data import write_prepared

    from finetune_trainer.storage.objects import Credentials
    from finetune_trainer.storage.s3server import EmbeddedS3

    heads = "".join(f"{f'at {p:.0%}, s':>12}" for p in positions)
    print(f"\nfrom S3 to the first batch\n{'samples':>12}  {'shards (first batch)':22}{heads}")
    with tempfile.TemporaryDirectory() as folder, EmbeddedS3(Path(folder) / "s3") as server:
        server.ensure_bucket(BUCKET)
        keys = Credentials(server.access_key, server.secret_key, source="the benchmark")
        for samples in counts:
            uri = f"s3://{BUCKET}/{samples}"
            scratch = Path(folder) / "scratch"
            manifest = write_prepared(server.store(), uri, scratch, made_up(samples))
            figures = [alone(first_batch, server.endpoint, keys, uri, p) for p in positions]
            shards = f"{len(manifest.shards['train'])} ({max(n for _, n in figures)})"
            times = "".join(f"{took:12.3f}" for took, _ in figures)
            print(f"{samples:12,}  {shards:22}{times}", flush=True)


def alone(work: Any, *arguments: Any) -> Any:
    """Return the result of a function, run in its own process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, nargs="+", default=[10_000, 1_000_000, 10_000_000])
    parser.add_argument("--stored", type=int, nargs="*", default=[10_000, 1_000_000])
    options = parser.parse_args()
    positions = (0.0, 0.5, 0.99)
    heads = "".join(f"{f'at {p:.0%}, s':>12}" for p in positions)
    print(f"{'samples':>12}  {'mixture':22}{heads}{'peak MiB':>12}")
    for samples in options.samples:
        for mixture in MIXTURES:
            figures = [alone(first_step, samples, mixture, done) for done in positions]
            times = "".join(f"{took:12.3f}" for took, _ in figures)
            memory = max(held for _, held in figures)
            print(f"{samples:12,}  {mixture:22}{times}{memory:12.0f}", flush=True)
    measure_stored(options.stored, positions)


if __name__ == "__main__":
    main()
