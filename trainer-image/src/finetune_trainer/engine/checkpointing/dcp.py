"""Save and load trained weights and optimizer state with torch's distributed checkpoint (DCP). A
checkpoint can be loaded at any world size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter
from torch.utils._pytree import tree_leaves, tree_map

from finetune_trainer.engine.checkpointing.dcp_storage import LoadPlannerOfValues
from finetune_trainer.engine.checkpointing.staging import StagedState, State
from finetune_trainer.engine.dtensors import is_sharded_tensor, local_tensor
from finetune_trainer.engine.optimizers import Optimizers
from finetune_trainer.engine.pissa import is_kept
from finetune_trainer.failures import recognise


def state_of(model: nn.Module, optimizers: Optimizers) -> State:
    """Return the live state: its tensors share memory with the model and change with the next
    step."""
    weights, moments = get_state_dict(model, optimizers)
    return {"model": _kept(model, weights), "optimizer": moments}


def weights_of(model: nn.Module) -> State:
    """Return the live weights that checkpoints hold, without optimizer state; as ``state_of``."""
    return {"model": _kept(model, get_model_state_dict(model))}


def save_state(writer: StorageWriter, staged: StagedState, group: dist.ProcessGroup | None) -> None:
    """Write this rank's part of a state.

    Args:
        group: a process group of all ranks; None: single process.

    An error on one rank is raised on every rank.
    """
    with _first_cause():
        state_dict_saver.save(
            {}, storage_writer=writer, planner=staged, process_group=group, no_dist=group is None
        )


def load_state(
    reader: StorageReader,
    model: nn.Module,
    optimizers: Optimizers,
    group: dist.ProcessGroup | None,
) -> None:
    """Load trained weights and optimizer state that any number of ranks wrote. An error on one rank
    is raised on every rank; the model may then be partly loaded."""
    state = state_of(model, optimizers)
    load(reader, state, group)
    set_state_dict(
        model,
        optimizers,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(strict=False),
    )


def load_weights(
    reader: StorageReader, model: nn.Module, group: dist.ProcessGroup | None = None
) -> None:
    """Load trained weights without optimizer state; raises as ``load_state`` does."""
    state = weights_of(model)
    load(reader, state, group)
    set_model_state_dict(model, state["model"], options=StateDictOptions(strict=False))


def load(reader: StorageReader, state: State, group: dist.ProcessGroup | None) -> None:
    """Load every entry of ``state`` in place. Without sharded tensors rank 0 reads and broadcasts
    to the other ranks."""
    if group is not None and not any(map(is_sharded_tensor, tree_leaves(state))):
        _load_alike(reader, state, group)
        return
    with _first_cause():
        state_dict_loader.load(
            state, storage_reader=reader, planner=LoadPlannerOfValues(), process_group=group,
            no_dist=group is None,
        )  # fmt: skip


def _load_alike(reader: StorageReader, state: State, group: dist.ProcessGroup) -> None:
    """Read on rank 0 and broadcast: tensors in place over their device's process group, other
    values and failures as pickled objects."""
    message: list[Any] = [None, None]
    if dist.get_rank(group) == 0:
        try:
            load(reader, state, None)
            message[0] = tree_map(lambda leaf: None if isinstance(leaf, Tensor) else leaf, state)
        except Exception as error:
            message[1] = recognise(error)
    dist.broadcast_object_list(message, src=0, group=group)
    if message[1] is not None:
        raise message[1]
    for leaf in tree_leaves(state):
        if isinstance(leaf, Tensor):
            own = local_tensor(leaf)
            dist.broadcast(own, src=0, group=None if own.is_cuda else group)
    same = tree_map(
        lambda own, received: own if isinstance(own, Tensor) else received, state, message[0]
    )
    state.update(same)


@contextmanager
def _first_cause() -> Iterator[None]:
    """Raise the error of the lowest failed rank in place of torch's ``CheckpointException``."""
    try:
        yield
    except CheckpointException as error:
        cause, _ = error.failures[min(error.failures)]
        raise cause from error


def _kept(model: nn.Module, weights: dict[str, Any]) -> dict[str, Any]:
    """The weights that a checkpoint holds; a tied weight (output head and embedding) only under its
    first name. Frozen base weights are left out: a checkpoint of an adapter holds the adapter."""
    names = {name for name, weight in model.named_parameters() if is_kept(name, weight)}
    return {name: weight for name, weight in weights.items() if name in names}
