"""PiSSA (Meng et al. 2024, arXiv:2404.02948): an adapter that starts as the principal part of each
weight, with that part subtracted from the base.

    W x  +  s B A x  -  s B0 A0 x         B0, A0: the principal part; B, A start as B0, A0

The base weights are not changed: a second, frozen adapter subtracts the principal part. Every
checkpoint contains the frozen adapter, so a resumed attempt and publish split the weights as the
first attempt did, on any device. The two adapters, concatenated, are a plain adapter of twice the
rank.
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
# Power iterations of the randomised SVD, the fast variant of the paper.
_ITERATIONS: Final = 16


def is_kept(name: str, parameter: nn.Parameter) -> bool:
    """Return whether checkpoints contain a parameter: trained, or of the frozen adapter."""
    return parameter.requires_grad or f".{INITIAL}." in name


def add_initial(model: PeftModel, config: LoraConfig) -> None:
    """Add the frozen adapter beside the one of ``config``, without input dropout.

    Raises:
        UserError: 'UnsuitableMethod' if an adapted module is no linear layer.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and not isinstance(layer, Linear):
            raise UserError(
                "UnsuitableMethod",
                "spec.method.lora.initialization: PiSSA splits the weights of linear layers, and"
                f" {name.removeprefix('base_model.model.')} is not one; leave it out of"
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
def initialise(model: nn.Module, seed: int, rank: int = 0, world_size: int = 1) -> None:
    """Set both adapters to the principal part of each weight; all may be sharded.

    A decomposition is costly, and random. So each process (``rank`` of ``world_size``) computes
    those of some weights, and broadcasts the results.
    """
    layers: list[Any] = [  # their attributes are set by peft, not declared
        m for m in model.modules() if isinstance(m, LoraLayer) and "default" in m.lora_A
    ]
    for first in range(0, len(layers), world_size):
        turn = layers[first : first + world_size]
        for at, layer in enumerate(turn):
            weight = whole(layer.get_base_layer().weight)  # a collective of all ranks
            if at == rank:
                own = weight
        if rank < len(turn):
            torch.manual_seed(seed + first + rank)
            mine = _principal(turn[rank], own.float())
        for at, layer in enumerate(turn):
            shapes = [side["default"].weight.shape for side in (layer.lora_A, layer.lora_B)]
            found = mine if at == rank else [torch.empty(s, device=weight.device) for s in shapes]
            for half in found if world_size > 1 else ():
                dist.broadcast(half, src=at)
            for adapter, sign in (("default", 1), (INITIAL, -1)):
                put(layer.lora_A[adapter].weight, found[0])
                put(layer.lora_B[adapter].weight, sign * found[1])


def _principal(layer: Any, weight: Tensor) -> list[Tensor]:
    """Return A and B of the principal part of a weight; zero beyond the weight's rank."""
    weight = weight.T if getattr(layer, "fan_in_fan_out", False) else weight
    rank: int = min(layer.r["default"], *weight.shape)
    # Computed with twice the rank, in case singular values are close together.
    found = torch.svd_lowrank(weight, q=min(2 * rank, *weight.shape), niter=_ITERATIONS)
    u, s, v = (x[..., :rank] for x in found)
    root = (s / layer.scaling["default"]).sqrt()
    lacking = layer.r["default"] - rank
    halves = pad(root[:, None] * v.T, (0, 0, 0, lacking)), pad(u * root, (0, lacking))
    return [half.contiguous() for half in halves]  # for broadcast


def join(plain: nn.Module, tuned: nn.Module) -> None:
    """Write both adapters of ``tuned`` to the one adapter of ``plain``, of twice the rank."""
    values = dict(tuned.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            assert ".default." in name, "PiSSA adapts linear layers only"
            halves: list[Tensor] = [values[name], values[name.replace(".default.", f".{INITIAL}.")]]
            parameter.data = torch.cat(halves, dim=0 if ".lora_A." in name else 1).detach()
