"""A model in shards, of which each process reads its own.

    hollow model ──► method ──► loss ──► shards of zeros on each process ──► fill_shards

What a method adds is drawn on the hollow model as on a whole one, so a run begins alike however it
lies. Which bytes of which tensor become a shard is transformers' business: it renames, joins and
cuts what checkpoints hold as it does for whole models. It is asked for one block after another, so
that a process has no more in memory than its shards and those of one block a second time. A block
that it would cut otherwise than FSDP does is read whole, and cut here.
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
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from finetune_trainer.engine.dtensors import local_tensor, share_of
from finetune_trainer.engine.model import (
    CPU,
    TEXT,
    Purpose,
    check_complete,
    drawn_names,
    empty_base,
    not_tied,
)
from finetune_trainer.engine.placeholders import put_parameter, replace_parameters
from finetune_trainer.engine.task_losses import TASKS
from finetune_trainer.failures import UserError
from finetune_trainer.storage.weight_reader import Slice, Weights

Names = dict[int, str]
"""Tensors of a base model, by identity, and the names that they have in it. It holds none of them:
each must go when its shards are made."""

_BLOCK: Final = re.compile(r"(.*?\.\d+)\.")


def names_of(base: PreTrainedModel) -> Names:
    """What ``fill_shards`` must know of a base, taken before a method is applied to it."""
    return {id(value): name for name, value in _tensors(base).items()}


def named_in(module: nn.Module, names: Names) -> dict[str, str]:
    """Names in a module of the tensors that are the base's, with their names there; taken before
    it lies in shards."""
    return {new: names[id(v)] for new, v in _tensors(module).items() if id(v) in names}


@torch.no_grad()
def fill_shards(
    module: nn.Module,
    names: Mapping[str, str],
    path: Path,
    weights: Weights,
    purpose: Purpose = TEXT,
) -> None:
    """Give the shards of a module, in place, the rows of the weights that belong to them. A head
    that the checkpoint lacks, or has for other classes, stays as ``placeholder_base`` has drawn it.

    Args:
        module: it lies in shards on the gang.
        names: as ``named_in`` gives them.
        path: folder of the base.
        purpose: as of ``placeholder_base``.

    Raises:
        UserError: 'IncompleteModel' where weights are lacking, or are of another shape.
    """
    there = _tensors(module)
    _Filling({base: there[name] for name, base in names.items()}, path, weights, purpose).run()


class _Filling:
    """The filling of a model's shards.

    What transformers fills is a base as a checkpoint knows it, with the shards as its parameters.
    """

    def __init__(
        self, targets: Mapping[str, Tensor], path: Path, weights: Weights, purpose: Purpose
    ) -> None:
        self._path, self._weights, self._purpose = path, weights, purpose
        self._targets = targets
        self._sharded = self._stand_in()
        self._head = tuple(f"{name}." for name in TASKS[purpose.task].head(self._sharded))
        self._drawn = drawn_names(self._sharded, path, purpose)
        parameters: Mapping[str, Any] = targets
        replace_parameters(self._sharded, lambda name, p: parameters[name])
        first = {id(value): name for name, value in targets.items()}
        own = dict(self._sharded.named_parameters(remove_duplicate=False))
        self._own = {name: first[id(value)] for name, value in own.items()}
        """Of each name, the first of the same tensor."""
        self._own |= {name: name for name in targets if name not in own}  # buffers
        self._conversions: list[Any] = get_model_conversion_mapping(self._sharded)
        self._converters = [c for c in self._conversions if isinstance(c, WeightConverter)]
        self._renamings = [c for c in self._conversions if isinstance(c, WeightRenaming)]
        self._there = dict.fromkeys(self._sharded.state_dict(), True)
        self._device = next(iter(targets.values())).device
        self._filled: set[str] = set()

    def run(self) -> None:
        """Fill all of it, block by block."""
        for block in _by_block(self._weights):
            self._fill(self._without_drawn(block) if self._drawn else block)
        needed = {
            name
            for name, value in self._targets.items()
            if isinstance(value, nn.Parameter) and not name.startswith(self._head)
        }
        check_complete(self._sharded, needed - self._filled)

    def _fill(self, block: dict[str, Slice]) -> None:
        cut = self._is_cut_rightly(block)
        stand_in = self._sharded if cut else self._stand_in()
        wanted = LoadStateDictConfig(
            device_map={"": self._device if cut else CPU}, weight_mapping=self._conversions
        )
        with self._weights.reading():
            said, _ = convert_and_load_state_dict_in_model(stand_in, block, wanted)
        wrong = {name for name, *_ in said.mismatched_keys} | set(said.conversion_errors)
        wrong = {name for name in wrong if not name.startswith(self._head)}  # it stays as drawn
        # Who has no part of a tensor has nothing to join either.
        nothing = {n for n in wrong & self._own.keys() if not self._held(n).numel()}
        if wrong - nothing:
            raise UserError(
                "IncompleteModel",
                f"spec.model: the weights of {', '.join(sorted(wrong)[:5])} do not fit a"
                f" {type(stand_in).__name__} as config.json describes it; write the model again",
            )
        for name in self._own.keys() - said.missing_keys:
            self._put(name, stand_in)
        self._filled |= {self._own[name] for name in nothing}

    def _held(self, name: str) -> Tensor:
        return local_tensor(self._targets[self._own[name]])

    def _put(self, name: str, stand_in: PreTrainedModel) -> None:
        """Copy what was read for a name into its shards, and let go of it."""
        own = self._own[name]
        target, found = self._targets[own], stand_in.get_parameter_or_buffer(name)
        if found is target or found.is_meta:  # not of this block
            return
        rows = local_tensor(found) if isinstance(found, DTensor) else share_of(target, found)
        mine = local_tensor(target)
        if own in self._filled and not torch.equal(mine, rows.to(mine)):
            raise not_tied(stand_in)
        mine.copy_(rows)
        self._filled.add(own)
        if isinstance(target, nn.Parameter):
            put_parameter(stand_in, name, target)

    def _stand_in(self) -> PreTrainedModel:
        return empty_base(self._path, self._purpose)

    def _is_cut_rightly(self, block: Mapping[str, Slice]) -> bool:
        """Whether transformers cuts shards of a block as FSDP does. It cuts the tensors of a
        checkpoint before it joins or splits them: experts that are joined to one tensor are dealt
        whole, but rows of what else changes its first dimension would be others'."""
        operations = {p: c.operations for c in self._converters for p in c.source_patterns}
        if all(map(_joins_experts, operations.values())):
            return True
        found = {self._renamed(name)[1] for name in block}
        return all(_joins_experts(operations[pattern]) for pattern in found if pattern)

    def _without_drawn(self, block: Mapping[str, Slice]) -> dict[str, Slice]:
        return {n: value for n, value in block.items() if self._renamed(n)[0] not in self._drawn}

    def _renamed(self, name: str) -> tuple[str, str | None]:
        """The name in the model of a checkpoint's tensor, and the pattern of what converts it."""
        prefix = self._sharded.base_model_prefix
        return rename_source_key(name, self._renamings, self._converters, prefix, self._there)


def _joins_experts(operations: list[Any]) -> bool:
    first, *later = operations
    dealt = isinstance(first, MergeModulelist) and first.dim == 0
    return dealt and all(isinstance(op, Concatenate) and op.dim > 0 for op in later)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; of those with several, the first."""
    kept = module.state_dict(keep_vars=True).keys()
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in kept}
    return {**dict(module.named_parameters()), **buffers}


def _by_block(weights: Weights) -> Iterator[dict[str, Slice]]:
    """The tensors of one block after another; those of none, which may be large, one by one."""

    def key(name: str) -> str:
        found = _BLOCK.match(name)
        return found[1] if found else name

    for _, names in groupby(sorted(weights, key=key), key):
        yield {name: weights[name] for name in names}
