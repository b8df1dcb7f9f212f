"""Parameters of a model under tuning: how many there are, and how the optimizer groups them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from finetune_api.spec import FineTuneJobSpec


@dataclass(frozen=True)
class Parameters:
    """Sizes of a model under tuning."""

    trainable: int
    total: int


def parameter_counts(model: nn.Module) -> Parameters:
    """Trainable and total parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return Parameters(sum(n for n, train in sizes if train), sum(n for n, _ in sizes))


def optimizer_groups(model: nn.Module, spec: FineTuneJobSpec) -> list[dict[str, object]]:
    """Parameter groups of the optimizer: weight decay for matrices, none for norms and biases.
    None is empty: a checkpoint keeps no settings of a group without parameters."""
    trained = [p for p in model.parameters() if p.requires_grad]
    decay = float(spec.training.weight_decay)
    groups: list[dict[str, object]] = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
