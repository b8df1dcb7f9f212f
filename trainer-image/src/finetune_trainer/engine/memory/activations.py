"""Count the activations that a forward pass saves for the backward pass.

An ``ActivationTracker`` hooks into a model and adds up the storages that autograd saves. Attention
is replaced by a function without arithmetic that saves what variable-length kernels save: queries,
keys, values and the output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from finetune_trainer.engine.packing.attention import (
    as_computed,
    for_efficient,
    for_flash,
    is_flash,
)
from finetune_trainer.engine.packing.layout import DocumentLayout
from finetune_trainer.engine.packing.packed import Attend

ATTENTION: Final = "finetune_profiled"
"""Name under which ``profiled_attention`` is registered."""
_keys: _Memory | None = None
"""Counter for keys and values of the forward pass in progress."""


@dataclass
class TrackedActivations:
    """Bytes that a forward pass saves; the fields are those of ``estimate.Activations``."""

    saved: int = 0
    outside: int = 0
    block: int = 0
    inputs: int = 0
    keys: int = 0


@dataclass
class _Memory:
    """Set of distinct storages, keyed by address; references are kept so that no address is
    reused."""

    storages: dict[int, torch.UntypedStorage] = field(default_factory=dict)

    def add(self, tensor: Tensor) -> bool:
        """Add the tensor's storage; return whether it is new."""
        storage = tensor.untyped_storage()
        new = storage._cdata not in self.storages
        self.storages.setdefault(storage._cdata, storage)
        return new

    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


class ActivationTracker:
    """Count the storages that a forward pass saves, per decoder block that first saves them."""

    def __init__(self, model: nn.Module, blocks: list[nn.Module]) -> None:
        self._blocks = blocks
        self._parameters = _Memory()
        for parameter in model.parameters():
            self._parameters.add(parameter)
        self._place = 0
        self._all = _Memory()
        self._places = [_Memory() for _ in range(len(blocks) + 1)]
        """Index 0: outside of blocks; then one per block."""
        self._inputs, self._keys = _Memory(), _Memory()

    @contextmanager
    def watching(self) -> Iterator[None]:
        global _keys
        handles = []
        for number, block in enumerate(self._blocks, start=1):
            handles += [
                block.register_forward_pre_hook(self._enter(number, block), with_kwargs=True),
                block.register_forward_hook(self._leave),
            ]
        _keys = self._keys
        try:
            with saved_tensors_hooks(self._save, lambda saved: saved):
                yield
        finally:
            _keys = None
            for handle in handles:
                handle.remove()

    def _enter(self, number: int, block: nn.Module) -> Any:
        trains = any(p.requires_grad for p in block.parameters())

        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            self._place = number
            for value in (*args, *kwargs.values()):
                if not isinstance(value, Tensor) or not value.is_floating_point():
                    continue
                if trains or value.requires_grad:
                    self._inputs.add(value)

        return hook

    def _leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self._place = 0

    def _save(self, tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in self._parameters.storages and self._all.add(
            tensor
        ):
            self._places[self._place].add(tensor)
        return tensor

    def kept(self) -> TrackedActivations:
        outside, *blocks = (place.bytes() for place in self._places)
        return TrackedActivations(
            self._all.bytes(), outside, max(blocks, default=0), self._inputs.bytes(),
            self._keys.bytes(),
        )  # fmt: skip


class _ProfiledAttention(torch.autograd.Function):
    """Saves what an attention kernel saves for its backward pass, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attended = value.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])
        ctx.save_for_backward(query, key, value, attended)
        return attended


def profiled_attention(on_gpu: bool) -> Attend:
    """Attention of a micro-batch without arithmetic. It saves the kernel's inputs: on a CPU in
    float32, on a GPU as cast and padded for the kernel."""

    def attention(
        layout: DocumentLayout,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        query, key, value = as_computed(query, key, value)
        if _keys is not None:
            _keys.add(key)
            _keys.add(value)
        kind, width = query.dtype, value.shape[-1]
        if not on_gpu:
            query, key, value = query.float(), key.float(), value.float()
        else:
            fitted = for_flash if is_flash(query, value) else for_efficient
            query, key, value = fitted(query, key, value)
        attended: Tensor = _ProfiledAttention.apply(query, key, value)
        return attended[..., :width].to(kind)

    return attention
