"""Staged copy of the training state, from which a thread writes a checkpoint while training
continues.

    state ──► save plan of all ranks ──► this rank's items ──► staging buffer ──► (a thread writes)

torch's planner first assigns items to ranks (replicated items are distributed by size), and each
rank stages only the items it writes: under DDP a share of the state. The buffer is allocated at the
first checkpoint and reused. It is in host memory, or in a memory-mapped file on a local disk, which
the kernel writes back under memory pressure. Its layout is that of the written object, so the
upload needs no second copy.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from finetune_trainer.failures import UserError

ALIGNMENT: Final = 64
"""Alignment of tensors in the buffer, in bytes."""

State = dict[str, Any]
"""Trained weights and optimizer state by name; with several processes, this rank's part."""


@dataclass(frozen=True)
class Staged:
    """Position of an item in the buffer or in the tail after it."""

    start: int
    """Offset of the first byte."""
    shape: tuple[int, ...]
    dtype: torch.dtype


class StagedState(DefaultSavePlanner):
    """Copy of this rank's part of a state, valid until the next copy is made; also the save planner
    for torch's saver.

    Args:
        plan: items that this rank writes.
        items: position of each item.
        buffer: bytes of the tensors.
        tail: bytes of the other items; they follow the tensors.
    """

    def __init__(
        self, plan: SavePlan, items: Mapping[MetadataIndex, Staged], buffer: Tensor, tail: bytes
    ) -> None:
        super().__init__()
        self._plan = plan
        self.items = items
        self._buffer, self._tail = buffer, tail

    @property
    def pieces(self) -> tuple[memoryview, bytes]:
        """All bytes, in order."""
        raw: Any = self._buffer.numpy()
        return memoryview(raw), self._tail

    @property
    def size(self) -> int:
        """Total number of bytes."""
        return self._buffer.numel() + len(self._tail)

    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None: ...

    def create_local_plan(self) -> SavePlan:
        return self._plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        item = self.items[write_item.index]
        count = math.prod(item.shape) * item.dtype.itemsize
        if write_item.tensor_data is None:
            start = item.start - self._buffer.numel()
            return io.BytesIO(self._tail[start : start + count])
        return self._buffer[item.start : item.start + count].view(item.dtype).view(item.shape)


class Staging:
    """Make copies of a training state, one at a time.

    Args:
        disk: folder on a local disk for the copy; None: the copy is in memory.
        group: a CPU process group of all ranks; None: single process.
    """

    def __init__(self, disk: Path | None, group: dist.ProcessGroup | None) -> None:
        self._disk, self._group = disk, group
        self._known: list[Any] = []
        self._plan = SavePlan([])
        self._items: dict[MetadataIndex, Staged] = {}
        self._buffer = torch.empty(0, dtype=torch.uint8)

    @torch.no_grad()
    def copy(self, state: State) -> StagedState:
        """Copy this rank's part of the state to the CPU; a collective, all ranks must call it.

        Raises:
            UserError: 'ScratchFull' if the disk has too little space.
        """
        planner = DefaultSavePlanner()
        planner.set_up_planner(state)
        local = planner.create_local_plan()
        if self._is_new(local):
            self._plan = self._share(planner, local)
            self._lay_out()
        items, tail = dict(self._items), bytearray()
        for item in self._plan.items:
            data = planner.resolve_data(item)
            if isinstance(data, io.BytesIO):
                found = data.getvalue()
                start = self._buffer.numel() + len(tail)
                items[item.index] = Staged(start, (len(found),), torch.uint8)
                tail += found
            else:
                self._view(items[item.index]).copy_(data.detach(), non_blocking=True)
        # Copies from a GPU are asynchronous; one synchronization waits for all of them.
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return StagedState(self._plan, items, self._buffer, bytes(tail))

    def _is_new(self, local: SavePlan) -> bool:
        """Whether the state's form (items, chunks, dtypes) has changed on any rank."""
        form = [(i.index, i.tensor_data and (i.tensor_data.chunk, i.tensor_data.properties.dtype))
                for i in local.items]  # fmt: skip
        new = torch.tensor(int(form != self._known))
        self._known = form
        if self._group is not None:
            dist.all_reduce(new, group=self._group)
        return bool(new)

    def _share(self, planner: DefaultSavePlanner, local: SavePlan) -> SavePlan:
        """The items of ``local`` that the global plan assigns to this rank."""
        if self._group is None:
            return local
        plans: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(plans, local, group=self._group)
        shared, _ = planner.create_global_plan(plans)
        mine = {item.index for item in shared[dist.get_rank(self._group)].items}
        return replace(local, items=[item for item in local.items if item.index in mine])

    def _lay_out(self) -> None:
        """Assign buffer positions to the plan's tensors, one after another."""
        self._items, end = {}, 0
        for item in self._plan.items:
            if item.tensor_data is not None:
                chunk, dtype = item.tensor_data.chunk, item.tensor_data.properties.dtype
                self._items[item.index] = staged = Staged(end, tuple(chunk.sizes), dtype)
                size = math.prod(staged.shape) * dtype.itemsize
                end += -(-size // ALIGNMENT) * ALIGNMENT
        if end != self._buffer.numel():
            self._buffer = self._allocate(end)

    def _view(self, item: Staged) -> Tensor:
        size = math.prod(item.shape) * item.dtype.itemsize
        return self._buffer[item.start : item.start + size].view(item.dtype).view(item.shape)

    def _allocate(self, size: int) -> Tensor:
        if self._disk is None or size == 0:
            # Zeros, because the padding between tensors is written too.
            return torch.zeros(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        self._disk.mkdir(parents=True, exist_ok=True)
        # An unnamed file: its disk space is freed however the process ends.
        with tempfile.TemporaryFile(dir=self._disk) as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                raise UserError(
                    "ScratchFull",
                    f"{self._disk} has no space for a copy of the training state, {size:,} bytes"
                    f" ({error.strerror}): set checkpoint.staging: Memory, or give the nodes a"
                    " larger disk",
                ) from None
            return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8)


def stage(state: State, group: dist.ProcessGroup | None) -> StagedState:
    """Copy to memory a state that is written once."""
    return Staging(None, group).copy(state)
