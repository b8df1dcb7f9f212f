"""The copy of the training state from which a commit is written while training goes on.

Room for it is made at the first commit and used again: in this host's memory, or in a file of a
local disk that memory is mapped to, where the system writes it out as it needs the memory.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from itertools import accumulate
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.distributed._state_dict_utils import _copy_state_dict, _create_cpu_state_dict
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from finetune_trainer.engine.commits.dcp import State
from finetune_trainer.failures import UserError

ALIGNMENT: Final = 64
"""Of tensors in the room, in bytes."""


class Staging:
    """Copies of a training state, one at a time: a copy lasts until the next is made.

    Args:
        disk: folder on the local disk that holds the copy; None: memory does.
    """

    def __init__(self, disk: Path | None) -> None:
        self._disk = disk
        self._copy: State | None = None

    @torch.no_grad()
    def copy(self, state: State) -> State:
        """A copy of the state on the CPU; of a gang, of this rank's part.

        Raises:
            UserError: 'ScratchFull' where the disk has no room for it.
        """
        if self._copy is None:
            self._copy = self._make_room(state)
        # All at once from a GPU; what leaves the device is whole when the device has come so far.
        copied = _copy_state_dict(state, self._copy, non_blocking=True, type_check=False)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copied

    def _make_room(self, state: State) -> State:
        """A state of the same form, whose tensors lie side by side in the room."""
        empty: State = _create_cpu_state_dict(state)
        tensors = [_local(leaf) for leaf in tree_leaves(empty) if isinstance(leaf, Tensor)]
        tensors = [tensor for tensor in tensors if tensor.dim() and tensor.numel()]
        ends = list(accumulate(-(-t.nbytes // ALIGNMENT) * ALIGNMENT for t in tensors))
        room = self._room(ends[-1]) if ends else torch.empty(0, dtype=torch.uint8)
        for tensor, start in zip(tensors, [0, *ends], strict=False):
            part = room[start : start + tensor.nbytes]
            tensor.data = part.view(tensor.dtype).view(tensor.shape)
        return empty

    def _room(self, size: int) -> Tensor:
        if self._disk is None:
            return torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        self._disk.mkdir(parents=True, exist_ok=True)
        # Without a name: the disk has the room back when the process ends, however it ends.
        with tempfile.TemporaryFile(dir=self._disk) as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                raise UserError(
                    "ScratchFull",
                    f"{self._disk} has no room for a copy of the training state, {size:,} bytes"
                    f" ({error.strerror}): set checkpoint.staging: Memory, or give the nodes a"
                    " larger disk",
                ) from None
            return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8)


def _local(tensor: Tensor) -> Tensor:
    """The tensor itself, or this rank's shard of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
