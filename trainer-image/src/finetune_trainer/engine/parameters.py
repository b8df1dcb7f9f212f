"""Parameters of a model under tuning: counts, kinds, decoder blocks and optimizer groups."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

from torch import nn
from transformers import PreTrainedModel

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine.pissa import INITIAL

Group = dict[str, Any]
"""An optimizer's parameter group: ``params`` and settings."""
ORIGINAL: Final = ".original_module."
"""Part of the names of the original parameters that peft keeps beside trained copies of them."""


@dataclass(frozen=True)
class Parameters:
    """Parameter counts of a model under tuning."""

    trainable: int
    total: int


def parameter_counts(model: nn.Module) -> Parameters:
    """Count trainable and total parameters, without copies of initial values (of PiSSA adapters,
    and of modules that are trained beside an adapter)."""
    sizes = [
        (size_of(p), p.requires_grad)
        for name, p in model.named_parameters()
        if f".{INITIAL}." not in name and ORIGINAL not in name
    ]
    return Parameters(sum(n for n, train in sizes if train), sum(n for n, _ in sizes))


def size_of(parameter: nn.Parameter) -> int:
    """Number of elements. A 4-bit parameter packs two per byte and has a ``quant_state``."""
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else parameter.numel()


def optimizer_groups(model: nn.Module, spec: FineTuneJobSpec) -> list[Group]:
    """Return the parameter groups of the optimizer.

    Matrices have weight decay; norms, biases and scales have none. ``rate_factor`` multiplies the
    schedule's rate: for the B matrices of LoRA+ (Hayou et al. 2024), and by layer. No group is
    empty, because a checkpoint keeps no settings of empty groups.
    """
    decay = float(spec.training.weight_decay)
    ratio = float(spec.method.effective_lora.lora_plus_ratio)
    layer_decay = float(spec.training.layer_decay)
    above = depth_below_top(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = ratio if _is_lora_b(name) else 1.0
            factor *= layer_decay ** above.get(parameter, 0)
            key = (decay if is_matrix(name, parameter) else 0.0, factor)
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "rate_factor": factor}
        for (decay, factor), parameters in groups.items()
    ]


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Return whether a parameter is a matrix or several expert matrices in one tensor: no norm,
    bias or scale. (Biases of experts and learned scales have two dimensions too.)"""
    own = name.rsplit(".", 1)[-1]
    return parameter.ndim >= 2 and ".ia3_l." not in name and not own.endswith("bias")


def _is_lora_b(name: str) -> bool:
    return ".lora_B." in name or ".lora_embedding_B." in name


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the decoder's layers, lowest first: the largest module list whose length is the
    configuration's number of layers; without such a list, the largest whose modules have one
    class."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = _layers(model)
    known = [found for found in lists if found and len(found) == layers]
    alike = [found for found in lists if len({type(item) for item in found}) == 1]
    return max(known or alike, key=_weight_of, default=[])


def _layers(model: nn.Module) -> int | None:
    """Number of decoder layers in the configuration; None if it is not stated."""
    found = pretrained(model)
    config = found.config.get_text_config() if found is not None else None
    layers: int | None = getattr(config, "num_hidden_layers", None)
    return layers


def pretrained(model: nn.Module) -> PreTrainedModel | None:
    """Return the outermost transformers model in a module."""
    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)


def _weight_of(modules: list[nn.Module]) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def depth_below_top(model: nn.Module) -> dict[nn.Parameter, int]:
    """How far parameters are below the head: 1 in the top block, 1 more for each block below, and 1
    more for embeddings. Other parameters are absent: 0."""
    blocks = decoder_blocks(model)
    found = {p: len(blocks) - i for i, block in enumerate(blocks) for p in block.parameters()}
    for module in model.modules():
        if isinstance(module, nn.Embedding) or _embeds(module, blocks):
            found |= {p: len(blocks) + 1 for p in module.parameters()}
    return found


def _embeds(module: nn.Module, blocks: list[nn.Module]) -> bool:
    """Return whether a module holds embeddings and no decoder block."""
    has_some = any(isinstance(child, nn.Embedding) for child in module.children())
    return has_some and not any(inner in blocks for inner in module.modules())
