"""Trained weights and optimizer state on disk: torch's distributed checkpoint, read at any number
of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

# Frozen weights are the base model's: a commit of an adapter holds the adapter.
_TRAINED: Final = StateDictOptions(ignore_frozen_params=True)


State = dict[str, Any]
"""Trained weights and the optimizer's state, by name; of a gang, this rank's part."""


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """The state as it is in memory: it changes with the next step."""
    weights, moments = get_state_dict(model, optimizer, options=_TRAINED)
    return {"model": _trained(model, weights), "optimizer": moments}


def save_state(folder: Path, state: State, group: dist.ProcessGroup | None) -> None:
    """Write this rank's part of a state; ``group`` holds all ranks (None: this process is
    alone)."""
    state_dict_saver.save(state, checkpoint_id=folder, process_group=group, no_dist=group is None)


def load_state(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    group: dist.ProcessGroup | None,
) -> None:
    """Read trained weights and optimizer state, written by any number of ranks."""
    state = state_of(model, optimizer)
    state_dict_loader.load(state, checkpoint_id=folder, process_group=group, no_dist=group is None)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(ignore_frozen_params=True, strict=False),
    )


def load_weights(folder: Path, model: nn.Module) -> None:
    """Read trained weights alone, in one process."""
    weights = _trained(model, get_model_state_dict(model, options=_TRAINED))
    state_dict_loader.load({"model": weights}, checkpoint_id=folder, no_dist=True)
    set_model_state_dict(
        model, weights, options=StateDictOptions(ignore_frozen_params=True, strict=False)
    )


def _trained(model: nn.Module, weights: dict[str, Any]) -> dict[str, Any]:
    """Trained weights by their first name: torch leaves the second name of a frozen weight in (an
    output head that is the embedding), and of a trained one each name once."""
    names = {name for name, weight in model.named_parameters() if weight.requires_grad}
    return {name: weight for name, weight in weights.items() if name in names}
