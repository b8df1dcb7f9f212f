"""One process of a gang that fills its shards: what test_loading compares with whole models."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from finetune_api.spec import Training
from finetune_trainer.engine import gang as gangs
from finetune_trainer.engine.loading import fill_shards, named_in, names_of
from finetune_trainer.engine.loss import TokenLoss
from finetune_trainer.engine.memory import Sharding
from finetune_trainer.engine.model import hollow_base
from finetune_trainer.engine.precision import PRECISIONS
from finetune_trainer.engine.sharding import distribute, whole
from finetune_trainer.storage.objects import Credentials, ObjectInfo, ObjectStore
from finetune_trainer.storage.weights import Weights

Read = list[tuple[int, int]]


class Counting(ObjectStore):
    """A store that knows how much was read."""

    read = 0

    def get_range(self, uri: str, start: int, stop: int, *, etag: str | None = None) -> bytes:
        data = super().get_range(uri, start, stop, etag=etag)
        self.read += len(data)
        return data


def fill(
    rank: int, size: int, port: int, sharding: Sharding, folder: str, endpoint: str,
    keys: Credentials, objects: list[ObjectInfo], out: str,
) -> None:  # fmt: skip
    """Fill shards from object storage; the first process writes what all have together, and each
    how many bytes it read and holds."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": "2" if sharding == "HybridShard" else str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    store = Counting(endpoint, credentials=keys)
    gang = gangs.join(Training(precision="FP32"))
    base = hollow_base(Path(folder), torch.float32)
    loss = TokenLoss(base)
    named = named_in(loss, names_of(base))
    distribute(loss, gang, sharding, PRECISIONS["FP32"])
    fill_shards(loss, named, Path(folder), Weights.of_objects(store, objects))
    found = {named[name]: whole(p.detach()).clone() for name, p in loss.named_parameters()}
    buffers = dict(base.named_buffers())
    held = sum(
        p.to_local().nbytes if isinstance(p, DTensor) else p.nbytes for p in loss.parameters()
    )
    if rank == 0:
        torch.save((found, buffers), f"{out}/whole.pt")
    torch.save((store.read, held), f"{out}/{rank}.pt")
    gang.close()
