"""Muon (Jordan et al. 2024; Liu et al. 2025, arXiv:2502.16982), for whole or sharded parameters.

An update depends on the whole matrix. If sharded, each matrix has an owner: the owner gathers the
shards, orthogonalises the matrix, and returns to each rank its shard of the result.

    shards of momentum ──(all to all)──► own matrices ──► Newton-Schulz ──(all to all)──► shards

All other operations are elementwise, and run on the shards in float32. The ranks exchange bfloat16,
the input and output type of the iteration, so the result equals that of a single process.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from finetune_trainer.engine.dtensors import local_tensor

BATCH_ELEMENTS: Final = 1 << 26
"""Most elements that are orthogonalised in one batch: several copies of a batch are in memory."""


class Muon(torch.optim.Muon):
    """torch's Muon, where each rank orthogonalises only the matrices that it owns."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        found = [(group, p) for group in self.param_groups for p in group["params"]]
        taken = [(group, p) for group, p in found if p.grad is not None]
        updates = [self._direction(p, group) for group, p in taken]
        settings = {
            (group["ns_coefficients"], group["ns_steps"], group["eps"]) for group, _ in taken
        }
        assert len(settings) <= 1, "groups may differ only in rate and decay"
        for coefficients, steps, eps in settings:
            parameters = [p for _, p in taken]
            updates = _orthogonal(parameters, updates, coefficients, steps, eps)
        for (group, p), update in zip(taken, updates, strict=True):
            own = local_tensor(p)
            own.mul_(1 - group["lr"] * group["weight_decay"])
            own.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))

    def _direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """This rank's part of the matrix to orthogonalise (Nesterov momentum), in bfloat16."""
        gradient = parameter.grad
        assert gradient is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        own, momentum = local_tensor(gradient), local_tensor(state["momentum_buffer"])
        momentum.lerp_(own, 1 - group["momentum"])
        return own.lerp(momentum, group["momentum"]).bfloat16()


def _split(tensor: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    return tuple(torch.split(tensor, list(sizes)))


def _orthogonal(
    parameters: Sequence[Tensor], parts: Sequence[Tensor], coefficients: Sequence[float],
    steps: int, eps: float,
) -> list[Tensor]:  # fmt: skip
    """Orthogonalise each matrix; if sharded, take and return this rank's rows of each."""
    meshes = {p.device_mesh for p in parameters if isinstance(p, DTensor)}
    shared = [i for i, p in enumerate(parameters) if isinstance(p, DTensor)]
    assert len(meshes) <= 1, "one mesh holds all shards"
    assert len(shared) in (0, len(parameters)), "all parameters are sharded, or none"
    mesh = next(iter(meshes), None)
    if mesh is None or mesh.size(mesh.ndim - 1) == 1:
        return orthogonalise(list(parts), coefficients, steps, eps)
    for p in parameters:
        assert isinstance(p, DTensor) and p.placements[-1] == Shard(0), "sharded by rows"
    group = mesh.get_group(mesh.ndim - 1)
    exchange = _Exchange([p.shape for p in parameters], dist.get_rank(group), group)
    mine = orthogonalise(exchange.gather(parts), coefficients, steps, eps)
    return exchange.scatter(mine)


def orthogonalise(
    matrices: Sequence[Tensor], coefficients: Sequence[float], steps: int, eps: float
) -> list[Tensor]:
    """Run the Newton-Schulz iteration on bfloat16 matrices; equal shapes are batched."""
    found: list[Tensor] = [torch.empty(0)] * len(matrices)
    for alike in _alike([tuple(m.shape) for m in matrices]):
        x = torch.stack([matrices[i] for i in alike])
        tall = x.shape[1] > x.shape[2]
        x = x.mT if tall else x
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
        a, b, c = coefficients
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        for i, one in zip(alike, x.mT if tall else x, strict=True):
            found[i] = one
    return found


def _alike(shapes: Sequence[tuple[int, ...]]) -> Iterable[list[int]]:
    """Yield the positions of equal shapes, in batches."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for i, shape in enumerate(shapes):
        by_shape.setdefault(shape, []).append(i)
    for shape, positions in by_shape.items():
        count = max(1, BATCH_ELEMENTS // max(1, math.prod(shape)))
        for start in range(0, len(positions), count):
            yield positions[start : start + count]


def deal(shapes: Sequence[Sequence[int]], ranks: int) -> list[int]:
    """Choose the owner of each matrix, identically on all ranks. Costly matrices are assigned
    first, each to the rank with the least cost so far, so that ranks take equally long."""

    def cost(shape: Sequence[int]) -> float:
        low, high = min(shape), max(shape)
        return float(low * low * (2 * high + low))

    loads, owners = [0.0] * ranks, [0] * len(shapes)
    for i in sorted(range(len(shapes)), key=lambda i: (-cost(shapes[i]), i)):
        owners[i] = min(range(ranks), key=loads.__getitem__)
        loads[owners[i]] += cost(shapes[i])
    return owners


@dataclass
class _Exchange:
    """Exchange of matrices between the ranks that hold their rows and their owners."""

    shapes: Sequence[Sequence[int]]
    rank: int
    group: dist.ProcessGroup

    def __post_init__(self) -> None:
        self.none = torch.empty(0, dtype=torch.bfloat16)
        self.ranks = dist.get_world_size(self.group)
        owners = deal(self.shapes, self.ranks)
        self.owned = [[i for i, o in enumerate(owners) if o == r] for r in range(self.ranks)]

    def rows(self, matrix: int, rank: int) -> int:
        """Number of rows of a matrix that a rank holds, as FSDP shards them."""
        whole = self.shapes[matrix][0]
        chunk = -(-whole // self.ranks)
        return max(0, min(chunk, whole - rank * chunk))

    def size(self, matrices: Sequence[int], rank: int) -> int:
        """Number of elements of some matrices that a rank holds."""
        return sum(self.rows(i, rank) * self.shapes[i][1] for i in matrices)

    def gather(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Return the matrices that this rank owns, from the rows of all ranks."""
        self.none = parts[0].new_empty(0)  # on the device
        sent = [parts[i].reshape(-1) for owned in self.owned for i in owned]
        mine = self.owned[self.rank]
        came = self._swap(
            sent,
            [self.size(owned, self.rank) for owned in self.owned],
            [self.size(mine, r) for r in range(self.ranks)],
        )
        rows: list[list[Tensor]] = [[] for _ in mine]
        for r, part in enumerate(came):
            cut = _split(part, [self.size([i], r) for i in mine])
            for n, (i, piece) in enumerate(zip(mine, cut, strict=True)):
                rows[n].append(piece.view(self.rows(i, r), self.shapes[i][1]))
        return [torch.cat(pieces) for pieces in rows]

    def scatter(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """Return this rank's rows of all matrices, from the owners."""
        mine = self.owned[self.rank]
        cut = [
            _split(matrix, [self.rows(i, r) for r in range(self.ranks)])
            for i, matrix in zip(mine, matrices, strict=True)
        ]
        sent = [pieces[r].reshape(-1) for r in range(self.ranks) for pieces in cut]
        came = self._swap(
            sent,
            [self.size(mine, r) for r in range(self.ranks)],
            [self.size(owned, self.rank) for owned in self.owned],
        )
        found: list[Tensor] = [torch.empty(0)] * len(self.shapes)
        for owned, part in zip(self.owned, came, strict=True):
            sizes = [self.size([i], self.rank) for i in owned]
            for i, piece in zip(owned, _split(part, sizes), strict=True):
                found[i] = piece.view(self.rows(i, self.rank), self.shapes[i][1])
        return found

    def _swap(
        self, sent: Sequence[Tensor], to: Sequence[int], of: Sequence[int]
    ) -> tuple[Tensor, ...]:
        """Exchange flat tensors; ``to`` and ``of`` count the elements for and from each rank."""
        out = torch.cat([self.none, *sent])
        into = out.new_empty(sum(of))
        # As bytes, because not every backend supports bfloat16.
        dist.all_to_all_single(
            into.view(torch.uint8), out.view(torch.uint8), [2 * n for n in of],
            [2 * n for n in to], group=self.group,
        )  # fmt: skip
        return _split(into, of)
