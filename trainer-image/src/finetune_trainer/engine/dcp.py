"""Trained weights and optimizer state on disk: torch's distributed checkpoint, read at any number
of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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

from finetune_trainer.engine.optimizers import Optimizers
from finetune_trainer.engine.pissa import is_kept

State = dict[str, Any]
"""Trained weights and the state of the optimizers, by name; of a gang, this rank's part."""


def state_of(model: nn.Module, optimizers: Optimizers) -> State:
    """The state as it is in memory: it changes with the next step."""
    weights, moments = get_state_dict(model, optimizers)
    return {"model": _kept(model, weights), "optimizer": moments}


def save_state(folder: Path, state: State, group: dist.ProcessGroup | None) -> None:
    """Write this rank's part of a state; ``group`` holds all ranks (None: this process is
    alone)."""
    state_dict_saver.save(state, checkpoint_id=folder, process_group=group, no_dist=group is None)


def load_state(
    folder: Path,
    model: nn.Module,
    optimizers: Optimizers,
    group: dist.ProcessGroup | None,
) -> None:
    """Read trained weights and optimizer state, written by any number of ranks."""
    state = state_of(model, optimizers)
    state_dict_loader.load(state, checkpoint_id=folder, process_group=group, no_dist=group is None)
    set_state_dict(
        model,
        optimizers,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(strict=False),
    )


def load_weights(folder: Path, model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Read trained weights alone."""
    state = {"model": (weights := _kept(model, get_model_state_dict(model)))}
    state_dict_loader.load(state, checkpoint_id=folder, process_group=group, no_dist=group is None)
    set_model_state_dict(model, weights, options=StateDictOptions(strict=False))


def _kept(model: nn.Module, weights: dict[str, Any]) -> dict[str, Any]:
    """What a commit holds, by its first name (an output head that is the embedding has two).
    Frozen weights are the base model's: a commit of an adapter holds the adapter."""
    names = {name for name, weight in model.named_parameters() if is_kept(name, weight)}
    return {name: weight for name, weight in weights.items() if name in names}
