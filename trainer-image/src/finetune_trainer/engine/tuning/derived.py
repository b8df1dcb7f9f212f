"""Initialize the method's weights that derive from the base weights, once these are loaded, sharded
or not.

DoRA            norm of each row of a weight
PiSSA           principal components of a weight
PromptTuning    embeddings of random tokens
a task's head   the copy that is trained
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine import pissa
from finetune_trainer.engine.dtensors import local_tensor, put, whole


@torch.no_grad()
def derive(model: nn.Module, spec: FineTuneJobSpec, rank: int = 0, world_size: int = 1) -> None:
    """Initialize the derived weights that ``apply_method`` has added to a model; a collective.

    Args:
        rank: of this process.
        world_size: number of ranks, all of which must call this function.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            _measure(module)
        elif isinstance(module, ModulesToSaveWrapper):
            _copy(module)
    if spec.method.type == "PromptTuning":
        _take_embeddings(model, spec.training.seed)
    if spec.method.effective_lora.initialization == "PiSSA":
        pissa.initialise(model, spec.training.seed, rank, world_size)


def _measure(layer: Any) -> None:
    """Set DoRA's magnitudes (Liu et al. 2024, arXiv:2402.09353) of sharded weights, which were
    zeros when peft computed the norms. For unsharded weights, also in 4 bits, peft's values are
    right."""
    for magnitude in layer.lora_magnitude_vector.values():
        weight = layer.get_base_layer().weight
        if isinstance(weight, DTensor):
            norms = magnitude.get_weight_norm(whole(weight), lora_weight=0.0, scaling=1.0)
            put(magnitude.weight, norms)


def _copy(wrapper: ModulesToSaveWrapper) -> None:
    """Copy a sharded head into its trained copy; for unsharded weights peft's copy is right."""
    there = dict(wrapper.original_module.named_parameters())
    for copy in wrapper.modules_to_save.values():
        for name, parameter in copy.named_parameters():
            if isinstance(parameter, DTensor):
                local_tensor(parameter).copy_(local_tensor(there[name]))


def _take_embeddings(model: Any, seed: int) -> None:
    """Initialize prompt vectors with embeddings of random tokens, which learns faster (Lester et
    al. 2021)."""
    embedding = model.get_input_embeddings()
    weight = whole(embedding.weight)
    prompt = model.prompt_encoder["default"].embedding.weight
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(weight), (prompt.shape[0],), generator=generator)
    # Call the module: some embedding modules scale their output.
    put(prompt, functional_call(embedding, {"weight": weight}, ids.to(weight.device)))
