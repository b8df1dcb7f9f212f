"""Worker processes of test_dcp_storage: write a small sharded state to object storage, or read
it."""

from __future__ import annotations

import datetime
import threading
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from finetune_trainer.engine.checkpointing.dcp import load, save_state
from finetune_trainer.engine.checkpointing.dcp_storage import (
    METADATA,
    CheckpointReader,
    CheckpointWriter,
)
from finetune_trainer.engine.checkpointing.staging import Staging, stage
from finetune_trainer.failures import TrainerError
from finetune_trainer.storage import checkpoint_files
from finetune_trainer.storage.checkpoint_files import read_file
from finetune_trainer.storage.objects import Credentials, ObjectStore
from finetune_trainer.storage.run_head import Checkpoint

SHAPES = {"rows": (7, 1_000_001), "columns": (600, 2_000), "few": (1, 5), "flat": (11,)}
"""Odd sizes, so that shards are uneven and some ranks have none."""
CUT = {"rows": 0, "columns": 1, "few": 0, "flat": 0}
"""Sharded dimension."""


def values(name: str) -> Tensor:
    """Values of the tensor of this name."""
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(len(name)))


class Counting(ObjectStore):
    """Object store that counts the bytes of range reads."""

    read = 0
    lock = threading.Lock()
    """Ranges are read in several threads."""

    def get_range(self, uri: str, start: int, stop: int) -> bytes:
        with self.lock:
            self.read += stop - start
        return super().get_range(uri, start, stop)


def state_of_rank(size: int, fill: bool, shards: bool, copies: bool = False) -> dict[str, Any]:
    """State with sharded or unsharded tensors, a replicated tensor and a non-tensor entry.

    Args:
        copies: unsharded tensors are DTensors, as FSDP makes them of copied weights.
    """
    mesh = init_device_mesh("cpu", (size,) if not copies else (size, 1))
    state: dict[str, Any] = {}
    for name in SHAPES:
        whole = values(name) if fill else torch.zeros(SHAPES[name])
        state[name] = whole
        if shards or copies:
            placements = [Shard(CUT[name])] if shards else [Replicate(), Shard(CUT[name])]
            state[name] = distribute_tensor(whole, mesh, placements)
    state["all"] = torch.arange(5.0) if fill else torch.zeros(5)
    state["words"] = {"rate": 0.5 if fill else 0.0}
    return state


def work(
    rank: int, size: int, port: int, s3: tuple[str, str, str], uri: str, shards: bool, files: Any,
    told: Any, copies: bool = False,
) -> None:  # fmt: skip
    """Write the state if ``files`` is None, and report the files and the staged size. Else read the
    state, and report whether it is equal (or the reason of the error) and the bytes read."""
    torch.set_num_threads(1)
    checkpoint_files.PART_BYTES = 5 << 20  # type: ignore[misc]
    endpoint, *keys = s3
    store = Counting(endpoint, credentials=Credentials(*keys))
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    state = state_of_rank(size, files is None, shards, copies)
    if files is None:
        writer = CheckpointWriter(store, uri)
        staged = stage(state, dist.group.WORLD)
        save_state(writer, staged, dist.group.WORLD)
        told.put((writer.files, staged.size))
    else:
        checkpoint = Checkpoint(attempt=1, step=1, uri=uri, files=files, created=0.0)
        reader = CheckpointReader(store, checkpoint, read_file(store, checkpoint, METADATA))
        try:
            load(reader, state, dist.group.WORLD)
            told.put((same(state, shards), store.read))
        except TrainerError as error:
            told.put((error.reason, store.read))
    dist.barrier()
    dist.destroy_process_group()


def stage_share(rank: int, size: int, replicas: int, port: int, told: Any) -> None:
    """Stage a state with ``replicas`` replicas, sharded over the other mesh dimension; report the
    staged bytes, after checking a second copy in the same buffer."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    mesh = init_device_mesh("cpu", (replicas, size // replicas))
    whole: dict[str, Any] = {name: values(name) for name in SHAPES} | {"all": torch.arange(5.0)}
    state = whole
    if replicas < size:
        cut = {name: [Replicate(), Shard(CUT[name])] for name in SHAPES}
        state = whole | {n: distribute_tensor(whole[n], mesh, cut[n]) for n in SHAPES}
    staging = Staging(None, dist.group.WORLD)
    staged = staging.copy(state | {"words": {"rate": 0.5}})
    sizes = [staged.size]
    for value in state.values():
        local(value).add_(1.0)
    again = staging.copy(state | {"words": {"rate": 0.25}})
    sizes.append(again.size)
    assert sizes[0] == sizes[1]
    for item in again.create_local_plan().items:
        found = again.resolve_data(item)
        if isinstance(found, Tensor):
            assert torch.equal(found, local(state[item.index.fqn])), item.index
    told.put(staged.size)
    dist.barrier()
    dist.destroy_process_group()


def same(state: dict[str, Any], shards: bool) -> bool:
    """Whether a state that was read equals the written one."""
    expected = state_of_rank(dist.get_world_size(), fill=True, shards=shards)
    return expected.pop("words") == state["words"] and all(
        torch.equal(local(state[name]), local(value)) for name, value in expected.items()
    )


def local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value
