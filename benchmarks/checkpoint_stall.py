"""Training stall per checkpoint, and slowdown of the steps during its upload.

    python benchmarks/checkpoint_stall.py [--millions 50] [--steps 20] [--checkpoints 3]

AdamW trains a model of `--millions` parameters on this machine. Every `--steps` steps it saves a
checkpoint (12 bytes per parameter) to a local S3 server, in three modes: blocking, and asynchronous
from a copy in memory or on disk. "beside" is the factor by which steps take longer during an
upload. "plain requests" is the server's own rate, with puts and gets of the same part size and
concurrency. Server, upload and training share the machine's cores.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from finetune_api.run_spec import CONTRACT_VERSION, JobIdentity, RunSpec
from finetune_api.spec import FineTuneJobSpec, parse_spec
from finetune_trainer.engine.world import World, join
from finetune_trainer.storage.checkpoint_files import PARALLEL, PART_BYTES
from finetune_trainer.storage.objects import ObjectStore
from finetune_trainer.storage.s3server import EmbeddedS3
from finetune_trainer.train.checkpoint import CheckpointManager
from finetune_trainer.train.state import LoopState

BUCKET = "bench"
VOCABULARY, HIDDEN, TOKENS = 16_384, 512, 128
MB = 1_000_000


@dataclass
class Seconds:
    """Durations in one checkpoint mode."""

    stalls: list[float] = field(default_factory=list)
    intervals: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    """Steps during an upload."""
    alone: list[float] = field(default_factory=list)
    """All other steps."""

    def line(self, name: str) -> str:
        share = sum(self.stalls) / sum(self.intervals)
        quiet = statistics.median(self.alone)
        slowed = f"{statistics.median(self.beside) / quiet:8.2f}" if self.beside else f"{'–':>8}"
        return (
            f"{name:24}{statistics.median(self.stalls):10.2f}{max(self.stalls):10.2f}"
            f"{statistics.median(self.intervals):12.1f}{share:9.1%}{quiet:10.2f}{slowed}"
            f"{len(self.beside):10}"
        )


class Trainee:
    """A model under training."""

    def __init__(self, millions: int) -> None:
        torch.manual_seed(0)
        layer = 4 * HIDDEN * HIDDEN + 9 * HIDDEN * HIDDEN
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=3 * HIDDEN,
            num_hidden_layers=max(1, round((millions * MB - VOCABULARY * HIDDEN) / layer)),
            num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True,
        )  # fmt: skip
        self.model: nn.Module = AutoModelForCausalLM.from_config(config)
        self.optimizers = [torch.optim.AdamW(self.model.parameters(), fused=True)]
        self.bytes = 12 * sum(p.numel() for p in self.model.parameters())
        self._ids = torch.randint(0, VOCABULARY, (1, TOKENS))

    def step(self) -> float:
        began = time.perf_counter()
        self.model(input_ids=self._ids, labels=self._ids).loss.backward()
        self.optimizers[0].step()
        self.optimizers[0].zero_grad()
        return time.perf_counter() - began


def spec_of(name: str, staging: str) -> FineTuneJobSpec:
    return parse_spec({
        "model": {"source": f"s3://{BUCKET}/model"},
        "data": {"train": [{"source": f"s3://{BUCKET}/train.jsonl"}]},
        "output": {"destination": f"s3://{BUCKET}/{name}"},
        "training": {"precision": "FP32"},
        "checkpoint": {"staging": staging, "keepLast": 1},
    })  # fmt: skip


def checkpoints_of(
    world: World, store: ObjectStore, name: str, scratch: Path, staging: str
) -> CheckpointManager:
    """Return the checkpoint manager of a new run."""
    run_spec = RunSpec(
        version=CONTRACT_VERSION, job=JobIdentity(namespace="bench", name=name, uid="bench-0000"),
        run="1-bench",
        spec=spec_of(name, staging),
    )  # fmt: skip
    return CheckpointManager.take(world, store, run_spec, scratch)


def train(
    trainee: Trainee, checkpointer: CheckpointManager, steps: int, checkpoints: int, wait: bool
) -> Seconds:
    """Train, and save a checkpoint every `steps` steps. Waits for the last upload."""
    found = Seconds()
    for number in range(1, checkpoints + 1):
        began = time.perf_counter()
        for _ in range(steps):
            busy = checkpointer.upload is not None and not checkpointer.upload.over
            (found.beside if busy else found.alone).append(trainee.step())
        stood = time.perf_counter()
        checkpointer.save(trainee.model, trainee.optimizers, LoopState(step=number * steps))
        if wait:
            checkpointer.settle()
        found.stalls.append(time.perf_counter() - stood)
        found.intervals.append(time.perf_counter() - began)
    checkpointer.settle()
    return found


def rate(size: int, work: Callable[[], object]) -> float:
    """Return the rate of ``work`` over ``size`` bytes, in MB/s."""
    began = time.perf_counter()
    work()
    return size / MB / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=int, default=50)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--checkpoints", type=int, default=3)
    options = parser.parse_args()
    trainee = Trainee(options.millions)
    world = join(spec_of("join", "Memory"))
    with tempfile.TemporaryDirectory() as folder, EmbeddedS3(Path(folder) / "s3") as s3:
        s3.ensure_bucket(BUCKET)
        store, scratch = s3.store(), Path(folder) / "scratch"
        trainee.step()
        print(f"{trainee.bytes / MB:,.0f} MB of state, {torch.get_num_threads()} threads")
        print(
            f"{'checkpoint':24}{'stall, s':>10}{'max, s':>10}{'interval, s':>12}{'share':>9}"
            f"{'step, s':>10}{'beside':>8}{'of steps':>10}"
        )
        for name, staging, wait in (
            ("blocking", "Memory", True), ("asynchronous", "Memory", False),
            ("asynchronous, from disk", "Disk", False),
        ):  # fmt: skip
            checkpointer = checkpoints_of(
                world, store, f"{staging}-{wait}".lower(), scratch, staging
            )
            found = train(trainee, checkpointer, options.steps, options.checkpoints, wait)
            print(found.line(name), flush=True)

        def write() -> None:
            checkpointer.save(trainee.model, trainee.optimizers, LoopState(step=1_000_000))
            checkpointer.settle()

        parts = [f"s3://{BUCKET}/raw/{n}" for n in range(max(1, trainee.bytes // PART_BYTES))]
        data, size = bytes(PART_BYTES), len(parts) * PART_BYTES
        with ThreadPoolExecutor(PARALLEL) as pool:
            print(f"\n{'MB/s':24}{'write':>10}{'read':>10}")
            put = rate(size, lambda: list(pool.map(lambda uri: store.put(uri, data), parts)))
            get = rate(size, lambda: list(pool.map(lambda uri: len(store.get(uri)), parts)))
            print(f"{'plain requests':24}{put:10.0f}{get:10.0f}", flush=True)
        wrote = rate(trainee.bytes, write)
        began = time.perf_counter()
        checkpointer.restore(trainee.model, trainee.optimizers)
        took = time.perf_counter() - began
        print(f"{'checkpoint and restore':24}{wrote:10.0f}{trainee.bytes / MB / took:10.0f}")
        print(f"restored in {took:.1f} s")


if __name__ == "__main__":
    main()
