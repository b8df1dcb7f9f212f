"""Optimizers: what changes the weights, made from ``spec.training.optimizer``.

Each is set so that a learning rate means what it does for AdamW, whose update of a number is about
the rate or less: Adafactor's is scaled by the rate alone (by the size of the weight too only where
that is above 1, as of some norms), and Muon's has the root mean square of AdamW's (Liu et al. 2025,
arXiv:2502.16982). Where one is not for every weight, AdamW takes the rest: so there may be two.
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
"""What changes the weights: each parameter is of one of them."""


def make_optimizers(model: nn.Module, spec: FineTuneJobSpec) -> Optimizers:
    """Optimizers of the trained parameters; their learning rate comes with each step.

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
    """Make sure that a model under tuning, which may be empty, has what the optimizer is for, and
    the blocks that rates by layer are of.

    Raises:
        UserError: 'NoMatrices', 'UnsuitableModel'.
    """
    name = spec.training.optimizer
    if OPTIMIZERS[name].matrices and not split(model, name)[0]:
        raise UserError(
            "NoMatrices",
            f"spec.training.optimizer: {name} is for matrices of hidden layers (one by one, not of"
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
    """Trained parameters that an optimizer takes, and those that AdamW takes for it."""
    # Rare tokens have rare gradients, whose moments 8 bits lose; and a table is no map of vectors.
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
    """Embeddings, and what their adapters look up."""
    found: set[Tensor] = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    layers = (module for module in model.modules() if isinstance(module, LoraLayer))
    return found.union(p for layer in layers for p in layer.lora_embedding_A.parameters())


def _head(model: nn.Module) -> set[Tensor]:
    """Weights of what makes tokens or classes of the vectors of a model."""
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
    """Adapters of experts in one tensor: theirs lie side by side in one matrix."""
    wrappers = (module for module in model.modules() if isinstance(module, ParamWrapper))
    return {p for m in wrappers for side in (m.lora_A, m.lora_B) for p in side.parameters()}


def _of(groups: Sequence[Group], chosen: dict[nn.Parameter, None]) -> list[Group]:
    """The groups with the chosen parameters alone; none is empty."""
    found = [{**g, "params": [p for p in g["params"] if p in chosen]} for g in groups]
    return [g for g in found if g["params"]]


def state_bytes(model: nn.Module, name: OptimizerName) -> float:
    """Bytes of state that an optimizer will hold for a model under tuning; the model's parameters
    may be empty (on the meta device)."""
    own, rest = split(model, name)
    large = OPTIMIZERS[name].state_bytes
    return sum(
        p.numel() * (large if p in own and p.ndim >= 2 else OPTIMIZERS["AdamW"].state_bytes)
        for p in (*own, *rest)
    )


def step_if(optimizers: Optimizers, rate: float, taken: Tensor) -> None:
    """Let each optimizer make its step where ``taken`` is true, at the learning rate ``rate``: in
    its own kernel where that can be told so, else after waiting for the word."""
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
    # The least scale of a weight is 1, so that no smaller one scales its update.
    return torch.optim.Adafactor(groups, lr=0.0, eps=(None, 1.0))


def _muon(groups: list[Group]) -> torch.optim.Optimizer:
    return Muon(groups, lr=0.0)


_MAKE: Final[dict[OptimizerName, Callable[[list[Any]], torch.optim.Optimizer]]] = {
    "AdamW": _adamw,
    "AdamW8bit": _adamw_8bit,
    "Adafactor": _adafactor,
    "Muon": _muon,
}
