"""Tensors of zeros that take no memory: what stands for weights that are read later, or elsewhere.

Unlike those of the meta device they are real ones, so what is made beside them is made on the CPU,
and FSDP cuts shards from them. They lie in pages that nobody writes to, and all in the same. What
takes their place in a model later is put there by name.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor, nn

_zero_pages: Final[list[Tensor]] = []
"""Bytes of zero, the most last. Private pages take no memory while they are only read."""


def placeholder(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros, which must not be written to."""
    size = math.prod(shape) * dtype.itemsize
    if not _zero_pages or _zero_pages[-1].nbytes < size:
        pages = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        _zero_pages.append(torch.frombuffer(pages, dtype=torch.uint8))
    return _zero_pages[-1][:size].view(dtype).reshape(tuple(shape))


def is_placeholder(values: Tensor) -> bool:
    """Whether ``hollow`` made a tensor."""
    held = values.untyped_storage().data_ptr()
    return any(room.untyped_storage().data_ptr() == held for room in _zero_pages)


def in_float32(values: Tensor) -> Tensor:
    """The same in float32."""
    return placeholder(values.shape, torch.float32) if is_placeholder(values) else values.float()


def replace_parameters(model: nn.Module, make: Callable[[str, nn.Parameter], nn.Parameter]) -> None:
    """Put what ``make`` gives in the place of each parameter, by its first name; parameters that
    are shared stay so."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter not in made:
                made[parameter] = make(f"{path}.{name}".removeprefix("."), parameter)
            setattr(module, name, made[parameter])


def materialize(
    model: nn.Module, device: torch.device, only: Callable[[Tensor], bool] = lambda parameter: True
) -> None:
    """Give the parameters of a hollow model memory on a device; with ``only``, those that it picks,
    and leave the others."""

    def made(_name: str, p: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(torch.zeros_like(p, device=device), p.requires_grad) if only(p) else p

    replace_parameters(model, made)


def put_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put a parameter in the place of the one of a name."""
    path, _, own = name.rpartition(".")
    setattr(model.get_submodule(path), own, parameter)
