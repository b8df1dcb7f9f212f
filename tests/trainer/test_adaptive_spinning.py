"""Threads spin while cores are free and sleep beside other processes."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune_trainer.adaptive_spinning import AdaptiveSpinning, SpinDecision, can_adapt
from finetune_trainer.train.worker import spinning_of

pytestmark = pytest.mark.skipif(
    not can_adapt() or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two cores"
)


@pytest.mark.parametrize(
    ("waiting", "spins"),
    [
        ([0.0, 0.1, 0.2], [True, True, True]),
        ([0.8], [False]),
        # Four calm intervals in a row are needed to spin again.
        ([0.8, 0.1, 0.1, 0.1, 0.1], [False, False, False, False, True]),
        ([0.8, 0.1, 0.1, 0.4, 0.1, 0.1, 0.1], [False] * 7),
        ([0.8, 0.1, 0.1, 0.1, 0.0, 0.8, 0.1], [False, False, False, False, True, False, False]),
    ],
)
def test_decision(waiting: list[float], spins: list[bool]) -> None:
    decision = SpinDecision()
    assert [decision.update(share) for share in waiting] == spins


_TWO_THREADS_ON_ONE_CORE = """
import os, time
import torch
from finetune_trainer.adaptive_spinning import AdaptiveSpinning

def tasks():
    return [int(task) for task in os.listdir("/proc/self/task")]

torch.set_num_threads(2)
data = torch.randn(1 << 20)
expected = data.sum().item()
cores = os.sched_getaffinity(0)
with AdaptiveSpinning():
    before = len(tasks())
    for task in tasks():
        os.sched_setaffinity(task, {min(cores)})
    end = time.monotonic() + 60
    while len(tasks()) < before + len(cores):
        assert data.sum().item() == expected
        assert time.monotonic() < end, "the threads still spin"
    assert data.sum().item() == expected
end = time.monotonic() + 60
while len(tasks()) >= before:  # the watcher has ended, too
    assert time.monotonic() < end, "the second team is still there"
    time.sleep(0.01)
"""


def test_threads_that_share_a_core_sleep_and_results_stay_the_same() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    subprocess.run(
        [sys.executable, "-c", _TWO_THREADS_ON_ONE_CORE],
        env=environment, check=True, timeout=180,
    )  # fmt: skip


def test_a_training_process_on_cpus_adapts(monkeypatch: pytest.MonkeyPatch) -> None:
    world: Any = SimpleNamespace(device=torch.device("cpu"))
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert isinstance(spinning_of(world), AdaptiveSpinning)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert not isinstance(spinning_of(world), AdaptiveSpinning)
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert not isinstance(spinning_of(world), AdaptiveSpinning)
