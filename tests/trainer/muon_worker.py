"""Worker of test_muon: steps of Muon in a small world."""

from __future__ import annotations

import datetime
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from finetune_trainer.engine import muon

SHAPES = [(33, 64), (64, 32), (33, 64), (48, 48), (2, 32), (1, 16), (128, 64)]
"""Odd sizes, so that shards are uneven and some ranks have none."""


def steps(parameters: list[nn.Parameter], wrap: Any = lambda gradient: gradient) -> list[Any]:
    """Make three steps with the same gradients, and return the weights."""
    draw = torch.Generator().manual_seed(1)
    optimizer = muon.Muon(parameters, lr=0.02, weight_decay=0.01)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = wrap(torch.randn(parameter.shape, generator=draw))
        optimizer.step()
    return [p.detach() for p in parameters]


def start() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draw) for shape in SHAPES]


def work(rank: int, size: int, replicas: int, port: int, told: Any) -> None:
    """Report the gathered weights after sharded steps, and how many matrices this rank took."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    count, real = 0, muon.orthogonalise

    def counted(matrices: Any, *settings: Any) -> Any:
        nonlocal count
        count += len(matrices)
        return real(matrices, *settings)

    muon.orthogonalise = counted
    mesh = init_device_mesh("cpu", (replicas, size // replicas))
    placed = [Replicate(), Shard(0)]
    parameters = [nn.Parameter(distribute_tensor(w, mesh, placed)) for w in start()]
    found = steps(parameters, lambda gradient: distribute_tensor(gradient, mesh, placed))
    whole = [w.full_tensor() for w in found if isinstance(w, DTensor)]
    told.put(([w.tolist() for w in whole], count))
    dist.barrier()
    dist.destroy_process_group()
