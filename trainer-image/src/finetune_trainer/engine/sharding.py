"""Placement of a model on the ranks: a whole copy on each (DDP), or sharded (FSDP2).

    NoShard       every process holds a whole copy; gradients are averaged
    HybridShard   the processes of a node share one copy; gradients are averaged over the nodes
    FullShard     all processes share one copy

The mathematics is the same, so a run may resume with another sharding.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from finetune_trainer.engine.dtensors import is_sharded_tensor, local_tensor
from finetune_trainer.engine.memory.estimate import Sharding, shards_of
from finetune_trainer.engine.parameters import decoder_blocks
from finetune_trainer.engine.placeholders import is_placeholder, materialize
from finetune_trainer.engine.precision import Precision
from finetune_trainer.engine.world import World


def capacity(device: torch.device, processes: int) -> int:
    """Bytes of memory of one process: its GPU's, or its share of the container's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        whole = min(whole, int(text))
    return whole // processes


DataParallel = Literal["Single", "DDP", "FSDP"]
"""How the ranks run a module: each its own copy, under DDP, or by FSDP."""


def data_parallel_of(
    world: World, sharding: Sharding, precision: Precision, trained: bool = True
) -> DataParallel:
    """Return what ``distribute`` uses; ``trained``: whether the module has trained weights."""
    if not trained and (world.size == 1 or sharding == "NoShard"):
        return "Single"
    if precision.copies or (world.size > 1 and sharding != "NoShard"):
        return "FSDP"
    return "Single" if world.size == 1 else "DDP"


def distribute(
    loss: nn.Module, world: World, sharding: Sharding, precision: Precision, gathered: bool = False
) -> nn.Module:
    """Return the module to run: ``loss`` itself, sharded in place by FSDP, or wrapped by DDP if it
    has trained weights. Replicas (DDP, and FSDP without shards) get the weights of rank 0.

    If the precision computes with bfloat16 copies of the weights, FSDP makes the copies, sharded or
    not; gradients are reduced in float32.

    Args:
        gathered: whether blocks stay gathered between forward and backward pass.
    """
    trained = any(p.requires_grad for p in loss.parameters())
    data_parallel = data_parallel_of(world, sharding, precision, trained)
    if data_parallel == "Single":
        return loss.to(world.device)
    if data_parallel == "DDP":
        return DistributedDataParallel(
            loss.to(world.device), gradient_as_bucket_view=True, forward_sync_buffers=False
        )
    shards = shards_of(sharding, world.nodes, world.processes_per_node)
    dims = {"replicate": world.size // shards, "shard": shards}
    if shards == world.size:
        del dims["replicate"]
    mesh = init_device_mesh(world.device.type, tuple(dims.values()), mesh_dim_names=tuple(dims))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision.copies else None, reduce_dtype=torch.float32
    )
    for block in decoder_blocks(loss):
        _allocate_placeholders(block, world.device)
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=not gathered)
    _allocate_placeholders(loss, world.device)
    fully_shard(loss, mesh=mesh, mp_policy=policy)
    if shards == 1 and world.size > 1:
        broadcast(loss)
    return loss


@torch.no_grad()
def broadcast(module: nn.Module) -> None:
    """Give all processes the tensors of rank 0, as DDP does."""
    for tensor in (*module.parameters(), *module.buffers()):
        dist.broadcast(local_tensor(tensor), src=0)


def _allocate_placeholders(module: nn.Module, device: torch.device) -> None:
    """Allocate a module's placeholders on a GPU, as zeros. FSDP would copy them from the host: 280
    GB to each process for a model of 70 billion parameters in float32."""
    if device.type != "cpu":
        materialize(module, device, only=is_placeholder)


def is_sharded(module: nn.Module) -> bool:
    """Return whether FSDP runs a module, so that every forward pass is a collective."""
    return isinstance(module, FSDPModule)


def synchronise(module: nn.Module, now: bool) -> None:
    """Set whether the next backward pass reduces gradients, as the last one of a step does. Sharded
    gradients are reduced over the shards in every backward pass: whole gradients, kept over the
    micro-batches of a step, would take the memory that sharding saves."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(now or is_sharded_tensor(next(module.parameters())))
        module.set_requires_all_reduce(now)
    elif isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = now


def reshard(module: nn.Module) -> None:
    """Free gathered copies of the weights, which a forward pass may leave, so that a change of the
    weights is seen by the next one."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


@contextmanager
def root_gathered(module: nn.Module) -> Iterator[None]:
    """Gather the weights outside the blocks (embedding, head), for code that calls the model within
    ``module``; blocks gather themselves."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()
