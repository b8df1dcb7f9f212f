"""An elastic gang: supervisors on loopback, real rendezvous, real training at a changing number of
nodes."""

from __future__ import annotations

import json
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from bench import Attempt, Bench, curve
from elastic_worker import STUB, ForkedWorkers
from supervisors import MAIN, Nodes
from torch import Tensor

from finetune_trainer.engine.packing.feed import StepTensors
from finetune_trainer.storage import runfiles
from finetune_trainer.train import loop
from finetune_trainer.train.session import Session

SHORT_WAIT = (
    f"from finetune_trainer.supervise import supervisor; supervisor.LAST_CALL_SECONDS = 2; {MAIN}"
)


def options(bench: Bench) -> dict[str, Any]:
    """A run without held-out sets, whose evaluation would take most of the time."""
    data: dict[str, Any] = {"train": [{"source": f"{bench.bucket}/train.jsonl"}]}
    quality = {"deduplicate": False, "contamination": "Ignore"}
    split = {"validation": "0", "test": "0"}
    data |= {"quality": quality, "split": split}
    return {"checkpoint": {"everySteps": 3}, "data": data}


class Trained(NamedTuple):
    """What a run has trained, by the last attempt that took each step."""

    samples: dict[int, list[int]]
    """Samples by step, sorted."""
    steps: dict[int, list[int]]
    """Steps by attempt."""
    sizes: dict[int, int]
    """World size by attempt."""


def trained(shared: Path) -> Trained:
    by_attempt: dict[tuple[int, int], list[int]] = defaultdict(list)
    sizes = {}
    for path in shared.glob("trained-*"):
        attempt = int(path.name.split("-")[1])
        for line in path.read_text().splitlines():
            step, sizes[attempt], samples = json.loads(line)
            by_attempt[step, attempt] += samples
    last = {step: max(a for s, a in by_attempt if s == step) for step, _ in by_attempt}
    steps = {a: sorted(s for s, other in by_attempt if other == a) for a in sizes}
    return Trained({s: sorted(by_attempt[s, a]) for s, a in last.items()}, steps, sizes)


class Gang:
    """A gang on loopback whose steps the test holds."""

    def __init__(self, nodes: Nodes, bench: Bench, size: int, fewest: int) -> None:
        self.nodes, self.bench, self.size = nodes, bench, size
        self.run_spec = bench.run_spec(
            "1-elastic", compute={"nodes": size, "minNodes": fewest}, **options(bench)
        )
        (nodes.folder / "run-spec.json").write_text(self.run_spec.to_text())
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, *ranks: int) -> None:
        for rank in ranks:
            self.processes[rank] = self.nodes.start(
                STUB, rank, SHORT_WAIT, FINETUNE_NODES=self.size, FINETUNE_METRICS_PORT=0,
                FORKS=self.nodes.folder / "forks", LOG=self.nodes.folder / f"node-{rank}/log",
            )  # fmt: skip

    def lose(self, rank: int) -> None:
        self.nodes.kill_node(self.processes.pop(rank))

    def hold_before(self, step: int) -> None:
        part = self.nodes.shared / "hold.part"
        part.write_text(str(step))
        part.replace(self.nodes.shared / "hold")

    def wait_held(self, size: int, saved: int) -> None:
        """Wait until the gang is held with this many nodes, and a checkpoint is committed."""
        self.nodes.wait_for(f"held-{size}", seconds=480)
        deadline = time.monotonic() + 90
        while True:
            head = self.bench.head(self.run_spec)
            if head is not None and head.checkpoints and head.checkpoints[0].step >= saved:
                return
            assert time.monotonic() < deadline, self.nodes.logs()
            time.sleep(0.02)

    def end(self) -> list[int]:
        return [self.nodes.end(process, 300) for _, process in sorted(self.processes.items())]


@pytest.fixture
def forks(nodes: Nodes) -> Iterator[ForkedWorkers]:
    made = ForkedWorkers(nodes.folder / "forks")
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("forks")
def test_4_3_2_and_4_nodes_train_what_an_undisturbed_run_trains(
    nodes: Nodes, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    gang = Gang(nodes, bench, 4, fewest=2)
    began = time.monotonic()
    gang.hold_before(5)
    gang.start(0, 1, 2, 3)
    gang.wait_held(4, saved=3)
    gang.hold_before(10)
    gang.lose(3)
    gang.wait_held(3, saved=9)
    gang.hold_before(14)
    gang.lose(1)
    gang.wait_held(2, saved=12)
    (nodes.shared / "held-4").unlink()
    gang.start(1, 3)
    gang.wait_held(4, saved=12)
    gang.hold_before(10**6)
    assert gang.end() == [0] * 4, nodes.logs()
    print(f"4, 3, 2, 4 nodes in {time.monotonic() - began:.0f} s")

    found = trained(nodes.shared)
    sizes = [found.sizes[attempt] for attempt in sorted(found.sizes)]
    in_turn = iter(sizes)  # on a busy machine a node may come late, which is another growth
    assert all(size in in_turn for size in (4, 3, 2, 4)), sizes
    head = bench.head(gang.run_spec)
    shrunk = sum(after <= before for before, after in pairwise(sizes))
    assert head is not None and head.restarts == shrunk, "a growth is no restart"
    *_, smaller, larger = sorted(found.steps)
    assert found.steps[larger][0] == found.steps[smaller][-1] + 1, "a growth repeats no step"
    samples, losses = undisturbed(bench, monkeypatch)
    assert found.samples == samples
    resized = runfiles.read_result(bench.store, gang.run_spec.run_uri)
    assert curve(resized) == pytest.approx(losses, abs=1e-4)


def undisturbed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[int, list[int]], dict[int, float]]:
    """Train in this process; return samples and losses by step."""
    run_spec = bench.run_spec("1-whole", **options(bench))
    samples: dict[int, list[int]] = {}
    optimizer_step = loop.optimizer_step

    def step(session: Session, batch: StepTensors, rate: float) -> tuple[Tensor, Tensor]:
        (micro_batches,) = batch.plan.micro_batches
        samples[batch.plan.number] = sorted(s for micro in micro_batches for s in micro)
        return optimizer_step(session, batch, rate)

    monkeypatch.setattr(loop, "optimizer_step", step)
    Attempt(run_spec, bench.tmp_path / "whole").train()
    return samples, curve(runfiles.read_result(bench.store, run_spec.run_uri))
