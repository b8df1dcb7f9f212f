"""Optimizers, built from ``spec.training.optimizer``.

Each is set up so that a learning rate means the same as for AdamW, whose update of an element is
about the rate or less. Adafactor's update is scaled by the rate alone (by the RMS of the weight too
only if that exceeds 1, as in some norms). Muon's update has the RMS of AdamW's (Liu et al. 2025,
arXiv:2502.16982). Parameters that an optimizer does not support go to AdamW, so a run may have two
optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn

from finetune_api.optimizers import OPTIMIZERS, OptimizerName
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine.classification import head_names
from finetune_trainer.engine.muon import Muon
from finetune_trainer.engine.parameters import (
    Group,
    decoder_blocks,
    is_matrix,
    optimizer_groups,
    pretrained,
)
from finetune_trainer.failures import UserError

Optimizers = Sequence[torch.optim.Optimizer]
"""The optimizers of a run; each trained parameter belongs to exactly one."""


def make_optimizers(model: nn.Module, spec: FineTuneJobSpec) -> Optimizers:
    """Build the optimizers of the trained parameters; ``step_if`` sets the learning rate.

    Raises:
        UserError: as ``check_optimizer``.
    """
    check_optimizer(model, spec)
    name = spec.training.optimizer
    own, rest = split(model, name)
    groups = optimizer_groups(model, spec)
    pairs: tuple[tuple[OptimizerName, dict[nn.Parameter, None]], ...]
    pairs = ((name, own), ("AdamW", rest))
    return [_MAKE[of](_of(groups, chosen)) for of, chosen in pairs if chosen]


def check_optimizer(model: nn.Module, spec: FineTuneJobSpec) -> None:
    """Check that a model under tuning has parameters for its optimizer, and decoder blocks if
    learning rates vary by layer. Its parameters may be empty (on the meta device).

    Raises:
        UserError: 'NoMatrices', 'UnsuitableModel'.
    """
    name = spec.training.optimizer
    if OPTIMIZERS[name].matrices and not split(model, name)[0]:
        raise UserError(
            "NoMatrices",
            f"spec.training.optimizer: {name} supports matrices of hidden layers (2-D, not of"
            " experts in one tensor), and spec.method trains none; set training.optimizer: AdamW",
        )
    if float(spec.training.layer_decay) != 1 and not decoder_blocks(model):
        raise UserError(
            "UnsuitableModel",
            f"spec.training.layerDecay: {spec.training.layer_decay}, but no list of blocks is found"
            " in the model; set it to 1",
        )


def split(
    model: nn.Module, name: OptimizerName
) -> tuple[dict[nn.Parameter, None], dict[nn.Parameter, None]]:
    """Split the trained parameters into those of an optimizer and those left to AdamW."""
    # AdamW8bit: rare tokens have rare gradients, whose moments are lost in 8 bits. Muon: a lookup
    # table is not a linear map.
    left = _tables(model) if name in ("AdamW8bit", "Muon") else set()
    matrices = OPTIMIZERS[name].matrices
    if matrices:
        left |= _head(model) | _stacked(model)
    own: dict[nn.Parameter, None] = {}
    rest: dict[nn.Parameter, None] = {}
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            one = parameter.ndim == 2 and is_matrix(path, parameter)
            takes = parameter not in left and (one or not matrices)
            (own if takes else rest)[parameter] = None
    return own, rest


def _tables(model: nn.Module) -> set[Tensor]:
    """Embedding tables, and those of their adapters."""
    found: set[Tensor] = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    layers = (module for module in model.modules() if isinstance(module, LoraLayer))
    return found.union(p for layer in layers for p in layer.lora_embedding_A.parameters())


def _head(model: nn.Module) -> set[Tensor]:
    """Weights of the output head or the classification head."""
    found = pretrained(model)
    if found is None:
        return set()
    output = found.get_output_embeddings()  # type: ignore[no-untyped-call]
    if output is not None:
        return set(output.parameters())
    if found.base_model is found:
        return set()
    return {p for name in head_names(found) for p in found.get_submodule(name).parameters()}


def _stacked(model: nn.Module) -> set[Tensor]:
    """Adapters of experts in one tensor: one matrix holds those of all experts."""
    wrappers = (module for module in model.modules() if isinstance(module, ParamWrapper))
    return {p for m in wrappers for side in (m.lora_A, m.lora_B) for p in side.parameters()}


def _of(groups: Sequence[Group], chosen: dict[nn.Parameter, None]) -> list[Group]:
    """Restrict groups to the chosen parameters, without empty groups."""
    found = [{**g, "params": [p for p in g["params"] if p in chosen]} for g in groups]
    return [g for g in found if g["params"]]


def state_bytes(model: nn.Module, name: OptimizerName) -> float:
    """Return the bytes of optimizer state for a model under tuning, whose parameters may be empty
    (on the meta device)."""
    own, rest = split(model, name)
    large = OPTIMIZERS[name].state_bytes
    return sum(
        p.numel() * (large if p in own and p.ndim >= 2 else OPTIMIZERS["AdamW"].state_bytes)
        for p in (*own, *rest)
    )


def step_if(optimizers: Optimizers, rate: float, taken: Tensor) -> None:
    """Step each optimizer at the learning rate ``rate``, if ``taken`` is true. A fused optimizer
    reads ``taken`` on the device; for others the host waits for its value."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["rate_factor"]
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = (~taken).float()  # type: ignore[attr-defined]
            optimizer.step()
        elif taken.item():
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _adamw(groups: list[Group]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)


def _adamw_8bit(groups: list[Group]) -> torch.optim.Optimizer:
    from bitsandbytes.optim.adamw import AdamW8bit  # not in every image; see ``quantized``

    made: torch.optim.Optimizer = AdamW8bit(  # type: ignore[no-untyped-call]
        groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8
    )
    return made


def _adafactor(groups: list[Group]) -> torch.optim.Optimizer:
    # eps[1] is the least RMS of a weight that scales its update: smaller weights use 1.
    return torch.optim.Adafactor(groups, lr=0.0, eps=(None, 1.0))


def _muon(groups: list[Group]) -> torch.optim.Optimizer:
    return Muon(groups, lr=0.0)


_MAKE: Final[dict[OptimizerName, Callable[[list[Any]], torch.optim.Optimizer]]] = {
    "AdamW": _adamw,
    "AdamW8bit": _adamw_8bit,
    "Adafactor": _adafactor,
    "Muon": _muon,
}
