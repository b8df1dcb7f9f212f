"""PiSSA (Meng et al. 2024, arXiv:2404.02948): an adapter that begins as the principal part of each
weight, over a base from which that part was taken.

    W x  +  s B A x  -  s B0 A0 x         B0, A0: the principal part; B, A begin as these

The base is left as it is: a second, frozen adapter takes the principal part away. It is kept in
every commit, so a resumed gang and publish split the weights as the first attempt did, whatever
the device; and the two adapters side by side are a plain one of twice the rank.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from finetune_api.methods import Method

INITIAL: Final = "initial"
"""Name of the frozen adapter."""
# Power iterations of the randomised decomposition; the paper's fast one.
_ITERATIONS: Final = 16


def is_kept(name: str, parameter: nn.Parameter) -> bool:
    """Whether a commit holds a parameter: it is trained, or of the frozen adapter."""
    return parameter.requires_grad or f".{INITIAL}." in name


def add_initial(model: PeftModel, config: LoraConfig) -> None:
    """Put the frozen adapter beside that of ``config``, from whose inputs it drops nothing."""
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


def initialise(model: nn.Module, method: Method) -> None:
    """Give both adapters the principal part of each weight, where the method asks for it. The
    decomposition is random: one process does it for all."""
    if method.effective_lora.initialization != "PiSSA":
        return
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and "default" in layer.lora_A:
            _split(layer)


@torch.no_grad()
def _split(layer: LoraLayer) -> None:
    part: Any = layer  # its attributes are set by peft, not declared
    weight: Tensor = part.get_base_layer().weight.detach().float()
    weight = weight.T if getattr(layer, "fan_in_fan_out", False) else weight
    rank = min(part.r["default"], *weight.shape)
    # Twice the rank is sought, for where singular values lie close together.
    found = torch.svd_lowrank(weight, q=min(2 * rank, *weight.shape), niter=_ITERATIONS)
    u, s, v = (x[..., :rank] for x in found)
    root = (s / part.scaling["default"]).sqrt()
    for adapter, sign in (("default", 1.0), (INITIAL, -1.0)):
        a, b = part.lora_A[adapter].weight, part.lora_B[adapter].weight
        a.zero_()
        b.zero_()
        a[:rank] = root[:, None] * v.T
        b[:, :rank] = sign * u * root


def join(plain: nn.Module, tuned: nn.Module) -> None:
    """Give the one adapter of ``plain``, of twice the rank, the two of ``tuned``."""
    values = dict(tuned.named_parameters())
    for name, parameter in plain.named_parameters():
        if ".default." in name:
            halves: list[Tensor] = [values[name], values[name.replace(".default.", f".{INITIAL}.")]]
            parameter.data = torch.cat(halves, dim=0 if ".lora_A." in name else 1).detach()
