"""Weights of a sharded model: each process reads its own shards.

    placeholders ──► method ──► loss ──► FSDP shards of zeros ──► fill_shards ──► shards of weights

Parameters that a method adds are drawn on the placeholder model as on a whole one, so a run starts
with the same parameters at any sharding. transformers decides which bytes of which tensor become a
parameter (``transformers_loading``). It loads one block after another, so a process never holds
more than its shards and a second copy of one block's. A block that transformers would cut in
another way than FSDP is read whole, and cut here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from finetune_trainer.engine.dtensors import local_tensor, share_of
from finetune_trainer.engine.model import (
    CPU,
    TEXT,
    Purpose,
    build_base,
    check_complete,
    drawn_names,
    not_tied,
)
from finetune_trainer.engine.placeholders import put_parameter, replace_parameters
from finetune_trainer.engine.task_losses import TASKS
from finetune_trainer.engine.transformers_loading import BlockLoader
from finetune_trainer.failures import UserError
from finetune_trainer.storage.weight_reader import Slice, Weights

Names = dict[int, str]
"""Names of a base model's tensors, by the tensors' identity. It keeps no tensor alive: each is
freed when its shards are made."""

_BLOCK: Final = re.compile(r"(.*?\.\d+)\.")


def names_of(base: PreTrainedModel) -> Names:
    """Names of a base model's tensors, taken before a method is applied to it."""
    return {id(value): name for name, value in _tensors(base).items()}


def named_in(module: nn.Module, names: Names) -> dict[str, str]:
    """Names of the base's tensors within a module, and in the base; taken before the module is
    sharded."""
    return {new: names[id(v)] for new, v in _tensors(module).items() if id(v) in names}


@torch.no_grad()
def fill_shards(
    module: nn.Module,
    names: Mapping[str, str],
    path: Path,
    weights: Weights,
    purpose: Purpose = TEXT,
) -> None:
    """Read the weights of a sharded module into its shards, in place. Parameters of a head that the
    checkpoint lacks, or has for other classes, stay as ``build_base`` drew them.

    Args:
        module: sharded over the process group.
        names: as ``named_in`` gives them.
        path: folder of the base.
        purpose: as given to ``build_base``.

    Raises:
        UserError: 'IncompleteModel' where weights are missing, or have another shape.
    """
    tensors = _tensors(module)
    targets = {base: tensors[name] for name, base in names.items()}
    _Filling(targets, path, weights, purpose).run()


class _Filling:
    """The filling of a model's shards.

    transformers loads into ``_sharded``: a base model as a checkpoint knows it, with the shards as
    its parameters.

    Args:
        targets: the tensors to fill, by their names in the base.
    """

    def __init__(
        self, targets: Mapping[str, Tensor], path: Path, weights: Weights, purpose: Purpose
    ) -> None:
        self._path, self._weights, self._purpose = path, weights, purpose
        self._targets = targets
        self._sharded = self._meta_base()
        self._head = tuple(f"{name}." for name in TASKS[purpose.task].head(self._sharded))
        self._drawn = drawn_names(self._sharded, path, purpose)
        parameters: Mapping[str, Any] = targets
        replace_parameters(self._sharded, lambda name, p: parameters[name])
        first = {id(value): name for name, value in targets.items()}
        own = dict(self._sharded.named_parameters(remove_duplicate=False))
        self._own = {name: first[id(value)] for name, value in own.items()}
        """The first name of each name's tensor: tied parameters have several."""
        self._own |= {name: name for name in targets if name not in own}  # buffers
        self._loader = BlockLoader(self._sharded)
        self._device = next(iter(targets.values())).device
        self._filled: set[str] = set()

    def run(self) -> None:
        """Fill all targets, block by block."""
        for block in _by_block(self._weights):
            self._fill(self._without_drawn(block) if self._drawn else block)
        needed = {
            name
            for name, value in self._targets.items()
            if isinstance(value, nn.Parameter) and not name.startswith(self._head)
        }
        check_complete(self._sharded, needed - self._filled)

    def _fill(self, block: dict[str, Slice]) -> None:
        in_shards = self._loader.cuts_as_fsdp(block)
        model = self._sharded if in_shards else self._meta_base()
        with self._weights.reading():
            report = self._loader.load(model, block, self._device if in_shards else CPU)
        unfit = {name for name in report.unfit if not name.startswith(self._head)}  # stays drawn
        # A rank without a part of a tensor has nothing to merge either.
        empty = {n for n in unfit & self._own.keys() if not self._local(n).numel()}
        if unfit - empty:
            raise UserError(
                "IncompleteModel",
                f"spec.model: the weights of {', '.join(sorted(unfit)[:5])} do not fit a"
                f" {type(model).__name__} as config.json describes it; write the model again",
            )
        for name in self._own.keys() - report.missing:
            self._put(name, model)
        self._filled |= {self._own[name] for name in empty}

    def _local(self, name: str) -> Tensor:
        return local_tensor(self._targets[self._own[name]])

    def _put(self, name: str, model: PreTrainedModel) -> None:
        """Copy a loaded tensor into its shards, and free it."""
        own = self._own[name]
        target, loaded = self._targets[own], model.get_parameter_or_buffer(name)
        if loaded is target or loaded.is_meta:  # not of this block
            return
        rows = local_tensor(loaded) if isinstance(loaded, DTensor) else share_of(target, loaded)
        shard = local_tensor(target)
        if own in self._filled and not torch.equal(shard, rows.to(shard)):
            raise not_tied(model)
        shard.copy_(rows)
        self._filled.add(own)
        if isinstance(target, nn.Parameter):
            put_parameter(model, name, target)

    def _meta_base(self) -> PreTrainedModel:
        return build_base(self._path, init="Meta", purpose=self._purpose, pack=False)

    def _without_drawn(self, block: Mapping[str, Slice]) -> dict[str, Slice]:
        drawn = self._drawn
        return {n: v for n, v in block.items() if self._loader.parameter_name(n) not in drawn}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; tied ones by their first name."""
    kept = module.state_dict(keep_vars=True).keys()
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in kept}
    return {**dict(module.named_parameters()), **buffers}


def _by_block(weights: Weights) -> Iterator[dict[str, Slice]]:
    """The tensors of one block after another; tensors outside of blocks may be large, and come one
    by one."""

    def key(name: str) -> str:
        found = _BLOCK.match(name)
        return found[1] if found else name

    for _, names in groupby(sorted(weights, key=key), key):
        yield {name: weights[name] for name in names}
