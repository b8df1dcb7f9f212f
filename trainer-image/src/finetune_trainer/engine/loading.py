"""A model in shards, of which each process reads its own.

    hollow model ──► method ──► loss ──► shards of zeros on each process ──► fill_shards

What a method adds is drawn on the hollow model as on a whole one, so a run begins alike however it
lies. Which bytes of which tensor become a shard is transformers' business: it renames, joins and
cuts what checkpoints hold as it does for whole models. It is asked for one block after another, so
that a process has no more in memory than its shards and those of one block a second time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine.classification import check_complete
from finetune_trainer.engine.model import empty_base, put_parameter, replace_parameters
from finetune_trainer.engine.sharding import held
from finetune_trainer.failures import UserError
from finetune_trainer.storage.weights import Slice, Weights

Names = dict[nn.Parameter, str]
"""Parameters of a base model by the names that they have in it."""

_BLOCK: Final = re.compile(r"(.*?\.\d+)\.")


def reads_base(spec: FineTuneJobSpec) -> bool:
    """Whether the model must be whole in the memory of each process before it can be tuned: where
    what is new is made of the base's weights, or by what the checkpoint lacks."""
    lora, method = spec.method.effective_lora, spec.method.type
    decomposed = method in ("LoRA", "QLoRA") and (lora.use_dora or lora.initialization == "PiSSA")
    return decomposed or method == "PromptTuning" or not spec.kind.generates


def names_of(base: PreTrainedModel) -> Names:
    """What ``fill_shards`` must know of a base, taken before a method is applied to it."""
    return {parameter: name for name, parameter in base.named_parameters()}


def named_in(module: nn.Module, names: Names) -> dict[str, str]:
    """Names in a module of the parameters that are the base's, with their names there; taken
    before it lies in shards."""
    return {new: names[p] for new, p in module.named_parameters() if p in names}


@torch.no_grad()
def fill_shards(module: nn.Module, names: Mapping[str, str], path: Path, weights: Weights) -> None:
    """Give the shards of a module, in place, the rows of the weights that belong to them.

    Args:
        module: it lies in shards on the gang.
        names: as ``named_in`` gives them.
        path: folder of the base.

    Raises:
        UserError: 'IncompleteModel' where weights are lacking, or are of another shape.
    """
    there = dict(module.named_parameters())
    targets = {base: there[name] for name, base in names.items()}
    # What transformers fills: the base as a checkpoint knows it, with the shards as its parameters.
    stand_in = empty_base(path)
    replace_parameters(stand_in, lambda name, _: targets[name])
    first = {parameter: name for name, parameter in targets.items()}
    own_name = {n: first[p] for n, p in stand_in.named_parameters(remove_duplicate=False)}
    conversions: list[Any] = get_model_conversion_mapping(stand_in)
    device = next(iter(targets.values())).device
    lacking = set(targets)
    for block in _by_block(weights):
        wanted = LoadStateDictConfig(device_map={"": device}, weight_mapping=conversions)
        with weights.reading():
            said, _ = convert_and_load_state_dict_in_model(stand_in, block, wanted)
        wrong = [name for name, *_ in said.mismatched_keys] + list(said.conversion_errors)
        if wrong:
            raise UserError(
                "IncompleteModel",
                f"spec.model: the weights of {', '.join(sorted(wrong)[:5])} do not fit a"
                f" {type(stand_in).__name__} as config.json describes it; write the model again",
            )
        for name in own_name.keys() - said.missing_keys:
            own = own_name[name]
            if name == own or own in lacking:  # of two names for one weight, the first counts
                held(targets[own]).copy_(held(stand_in.get_parameter(name)))
                lacking.discard(own)
            put_parameter(stand_in, name, targets[own])
    check_complete(stand_in, lacking)


def _by_block(weights: Weights) -> Iterator[dict[str, Slice]]:
    """The tensors of one block after another; those of none, which may be large, one by one."""

    def key(name: str) -> str:
        found = _BLOCK.match(name)
        return found[1] if found else name

    for _, names in groupby(sorted(weights, key=key), key):
        yield {name: weights[name] for name in names}
