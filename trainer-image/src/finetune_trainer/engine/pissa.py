"""PiSSA (Meng et al. 2024, arXiv:2404.02948): an adapter that begins as the principal part of each
weight, over a base from which that part was taken.

    W x  +  s B A x  -  s B0 A0 x         B0, A0: the principal part; B, A begin as these

The base is left as it is: a second, frozen adapter takes the principal part away. It is kept in
every checkpoint, so a resumed gang and publish split the weights as the first attempt did, force
the device; and the two adapters side by side are a plain one of twice the rank.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from torch.nn.functional import pad

from finetune_trainer.engine.dtensors import put, whole
from finetune_trainer.failures import UserError

INITIAL: Final = "initial"
"""Name of the frozen adapter."""
# Power iterations of the randomised decomposition; the paper's fast one.
_ITERATIONS: Final = 16


def is_kept(name: str, parameter: nn.Parameter) -> bool:
    """Whether a checkpoint holds a parameter: it is trained, or of the frozen adapter."""
    return parameter.requires_grad or f".{INITIAL}." in name


def add_initial(model: PeftModel, config: LoraConfig) -> None:
    """Put the frozen adapter beside that of ``config``, from whose inputs it drops nothing.

    Raises:
        UserError: 'UnsuitableMethod' where not all that is adapted is a linear layer.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and not isinstance(layer, Linear):
            raise UserError(
                "UnsuitableMethod",
                "spec.method.lora.initialization: PiSSA splits the weights of linear layers, and"
                f" {name.removeprefix('base_model.model.')} is none; leave it out of"
                " lora.targetModules, or set lora.initialization: Default",
            )
    frozen = LoraConfig(
        task_type=config.task_type,
        r=config.r,
        lora_alpha=config.lora_alpha,
        use_rslora=config.use_rslora,
        target_modules=config.target_modules,
    )
    model.add_adapter(INITIAL, frozen)
    tuner: Any = model.base_model
    tuner.set_adapter(["default", INITIAL])
    for name, parameter in model.named_parameters():
        if f".{INITIAL}." in name:
            parameter.requires_grad_(False)


@torch.no_grad()
def initialise(model: nn.Module, seed: int, place: int = 0, size: int = 1) -> None:
    """Give both adapters the principal part of each weight; weights and adapters may be in shards.

    A decomposition is dear, and random. So each process of a gang, by its ``place`` of ``size``,
    makes those of some weights, and tells the others what it found.
    """
    layers: list[Any] = [  # their attributes are set by peft, not declared
        m for m in model.modules() if isinstance(m, LoraLayer) and "default" in m.lora_A
    ]
    for first in range(0, len(layers), size):
        turn = layers[first : first + size]
        for at, layer in enumerate(turn):
            weight = whole(layer.get_base_layer().weight)  # all take part
            if at == place:
                own = weight
        if place < len(turn):
            torch.manual_seed(seed + first + place)
            mine = _principal(turn[place], own.float())
        for at, layer in enumerate(turn):
            shapes = [side["default"].weight.shape for side in (layer.lora_A, layer.lora_B)]
            found = mine if at == place else [torch.empty(s, device=weight.device) for s in shapes]
            for half in found if size > 1 else ():
                dist.broadcast(half, src=at)
            for adapter, sign in (("default", 1), (INITIAL, -1)):
                put(layer.lora_A[adapter].weight, found[0])
                put(layer.lora_B[adapter].weight, sign * found[1])


def _principal(layer: Any, weight: Tensor) -> list[Tensor]:
    """A and B of the principal part of a weight; zero beyond its rank."""
    weight = weight.T if getattr(layer, "fan_in_fan_out", False) else weight
    rank: int = min(layer.r["default"], *weight.shape)
    # Twice the rank is sought, for where singular values lie close together.
    found = torch.svd_lowrank(weight, q=min(2 * rank, *weight.shape), niter=_ITERATIONS)
    u, s, v = (x[..., :rank] for x in found)
    root = (s / layer.scaling["default"]).sqrt()
    lacking = layer.r["default"] - rank
    halves = pad(root[:, None] * v.T, (0, 0, 0, lacking)), pad(u * root, (0, lacking))
    return [half.contiguous() for half in halves]  # as they are sent


def join(plain: nn.Module, tuned: nn.Module) -> None:
    """Give the one adapter of ``plain``, of twice the rank, the two of ``tuned``."""
    values = dict(tuned.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            assert ".default." in name, "of linear layers, whose adapters are named so"
            halves: list[Tensor] = [values[name], values[name.replace(".default.", f".{INITIAL}.")]]
            parameter.data = torch.cat(halves, dim=0 if ".lora_A." in name else 1).detach()
