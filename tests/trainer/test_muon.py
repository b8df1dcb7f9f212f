"""Muon: the same steps as torch's, also if sharded, with matrices distributed over the ranks."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from muon_worker import SHAPES, start, steps, work
from torch import nn
from worlds import forked, free_port

from finetune_trainer.engine import muon

STEPS = 3


def test_steps_equal_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the matrices of one shape need several batches."""
    monkeypatch.setattr(muon, "BATCH_ELEMENTS", 33 * 64)
    ours = steps([nn.Parameter(w) for w in start()])
    parameters = [nn.Parameter(w) for w in start()]
    draw = torch.Generator().manual_seed(1)
    theirs = torch.optim.Muon(
        parameters, lr=0.02, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(STEPS):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        theirs.step()
    for found, expected in zip(ours, parameters, strict=True):
        assert (found - expected).norm() / expected.norm() < 1e-6


@pytest.mark.parametrize(("size", "replicas"), [(2, 1), (3, 1), (4, 2)])
def test_each_rank_orthogonalises_its_share_of_sharded_matrices(size: int, replicas: int) -> None:
    told = multiprocessing.get_context("forkserver").Manager().Queue()
    port = free_port()
    processes = [forked(work, rank, size, replicas, port, told) for rank in range(size)]
    for process in processes:
        process.join(90)
    assert [p.exitcode for p in processes] == [0] * size
    found = [told.get() for _ in range(size)]
    whole = steps([nn.Parameter(w) for w in start()])
    for weights, _ in found:
        for one, expected in zip(weights, whole, strict=True):
            assert (torch.tensor(one) - expected).norm() / expected.norm() < 1e-6
    counts = [count for _, count in found]
    assert sum(counts) == replicas * STEPS * len(SHAPES), "each matrix once per step and replica"
    assert max(counts) < STEPS * len(SHAPES)


def test_matrices_are_distributed_by_cost() -> None:
    shapes = [(4096, 4096), *[(1024, 4096)] * 8, (14336, 4096)]
    owners = muon.deal(shapes, 2)
    cost = [min(s) ** 2 * (2 * max(s) + min(s)) for s in shapes]
    loads = [sum(c for c, o in zip(cost, owners, strict=True) if o == rank) for rank in range(2)]
    assert owners[9] == 0 and owners[0] == 1, "the costliest alone"
    assert loads[0] == cost[9] and loads[1] == sum(cost) - cost[9]
    assert muon.deal([(8, 8)] * 6, 3) == [0, 1, 2, 0, 1, 2]
