"""Tensors of which this process may hold a shard: what is here, and what all have together."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local_tensor(value: Tensor) -> Tensor:
    """What this process holds of a tensor that may be in shards: the same memory."""
    return value.to_local() if isinstance(value, DTensor) else value


def whole(value: Tensor) -> Tensor:
    """A tensor that may be in shards, gathered."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def share_of(target: Tensor, values: Tensor) -> Tensor:
    """What of whole values lies in this process's shard of ``target``: the same memory."""
    if not isinstance(target, DTensor):
        return values
    shape, offsets = compute_local_shape_and_global_offset(
        target.shape, target.device_mesh, target.placements
    )
    return values[tuple(slice(o, o + n) for o, n in zip(offsets, shape, strict=True))]


@torch.no_grad()
def put(target: Tensor, values: Tensor) -> None:
    """Give a tensor that may be in shards its share of whole values."""
    local_tensor(target).copy_(share_of(target, values))
