"""The private parts of transformers that loading needs, in one module.

A checkpoint's tensors become a model's parameters by transformers' conversion table: some are
renamed, some merged (experts), some split. ``from_pretrained`` is the public way to that table, but
loads a whole model. ``BlockLoader`` loads one block at a time into parameters that may be sharded.

These names are not part of transformers' API. ``TESTED`` is the release that they were read in; a
test fails on another one, and says to read them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
)
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

TESTED: Final = "5.23"
"""Release of transformers (major.minor) in which the private names were read."""


def fill_conversion_table() -> None:
    """Compile the patterns of all architectures' conversions, once for this process and those that
    it forks."""
    get_checkpoint_conversion_mapping("llama")  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class BlockReport:
    """What became of a block's tensors."""

    missing: set[str]
    """Parameters and buffers of the model that the block does not hold."""
    unfit: set[str]
    """Parameters whose tensors have another shape, or could not be converted."""


class BlockLoader:
    """Loads a checkpoint into a model, one block at a time.

    Args:
        model: as a checkpoint knows it; its parameters may be DTensors.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._prefix = model.base_model_prefix
        self._names = dict.fromkeys(model.state_dict(), True)
        self._conversions: list[Any] = get_model_conversion_mapping(model)
        self._converters = [c for c in self._conversions if isinstance(c, WeightConverter)]
        self._renamings = [c for c in self._conversions if isinstance(c, WeightRenaming)]

    def load(
        self, model: PreTrainedModel, block: dict[str, Any], device: torch.device
    ) -> BlockReport:
        """Load tensors, by their names in the checkpoint, into a model on a device. Parameters are
        replaced, not written to."""
        config = LoadStateDictConfig(device_map={"": device}, weight_mapping=self._conversions)
        report, _ = convert_and_load_state_dict_in_model(model, block, config)
        unfit = {name for name, *_ in report.mismatched_keys} | set(report.conversion_errors)
        return BlockReport(set(report.missing_keys), unfit)

    def parameter_name(self, name: str) -> str:
        """The model's name for a tensor of the checkpoint."""
        return self._renamed(name)[0]

    def cuts_as_fsdp(self, names: Iterable[str]) -> bool:
        """Whether transformers cuts shards of these tensors of the checkpoint as FSDP does.

        transformers cuts a checkpoint's tensors before it merges or splits them. Experts that are
        merged into one tensor are dealt out whole, as FSDP does; any other conversion that changes
        the first dimension would give a rank the rows of another.
        """
        operations = {p: c.operations for c in self._converters for p in c.source_patterns}
        if all(map(_merges_experts, operations.values())):
            return True
        used = {self._renamed(name)[1] for name in names}
        return all(_merges_experts(operations[pattern]) for pattern in used if pattern)

    def _renamed(self, name: str) -> tuple[str, str | None]:
        """The model's name for a tensor, and the pattern of its converter."""
        return rename_source_key(name, self._renamings, self._converters, self._prefix, self._names)


def _merges_experts(operations: list[Any]) -> bool:
    first, *later = operations
    dealt = isinstance(first, MergeModulelist) and first.dim == 0
    return dealt and all(isinstance(op, Concatenate) and op.dim > 0 for op in later)


def float32_parameters(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str], bool]:
    """Which parameters, by name, transformers keeps in float32 in a model of another dtype."""
    plan: Mapping[str, torch.dtype] = model._get_dtype_plan(dtype)
    if not plan:
        return lambda name: False
    pattern, *_ = build_glob_alternation(list(plan))
    return lambda name: pattern.search(name) is not None
