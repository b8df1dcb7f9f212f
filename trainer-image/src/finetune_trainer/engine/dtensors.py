"""Access to tensors that may be sharded: the local shard and the whole tensor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local_tensor(value: Tensor) -> Tensor:
    """Return this process's shard of a tensor that may be sharded, as a view."""
    return value.to_local() if isinstance(value, DTensor) else value


def is_sharded_tensor(value: object) -> bool:
    """Whether processes hold different parts of a tensor. (FSDP's copies of unsharded weights are
    DTensors too, sharded over a mesh dimension of size 1.)"""
    if not isinstance(value, DTensor):
        return False
    sizes = zip(value.placements, value.device_mesh.shape, strict=True)
    return any(placement.is_shard() and size > 1 for placement, size in sizes)


def whole(value: Tensor) -> Tensor:
    """Gather a tensor that may be sharded."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def share_of(target: Tensor, values: Tensor) -> Tensor:
    """Return the part of whole ``values`` that is this process's shard of ``target``, as a view."""
    if not isinstance(target, DTensor):
        return values
    shape, offsets = compute_local_shape_and_global_offset(
        target.shape, target.device_mesh, target.placements
    )
    return values[tuple(slice(o, o + n) for o, n in zip(offsets, shape, strict=True))]


@torch.no_grad()
def put(target: Tensor, values: Tensor) -> None:
    """Copy this process's part of whole ``values`` to a tensor that may be sharded."""
    local_tensor(target).copy_(share_of(target, values))
