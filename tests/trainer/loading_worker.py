"""Worker of test_sharded_loading: one process of a world that loads its shards of a model."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from finetune_api.spec import parse_spec
from finetune_trainer.engine.base import BaseFiles
from finetune_trainer.engine.dtensors import whole
from finetune_trainer.engine.memory.estimate import Placement, Sharding
from finetune_trainer.engine.model import TEXT, Purpose
from finetune_trainer.engine.placeholders import is_placeholder
from finetune_trainer.engine.precision import precision_of
from finetune_trainer.engine.world import join
from finetune_trainer.storage.objects import Credentials, ObjectInfo, ObjectStore
from finetune_trainer.storage.published import Base
from finetune_trainer.train.tuned import open_model


class Counting(ObjectStore):
    """A store that counts the bytes read."""

    read = 0
    lock = threading.Lock()
    """Ranges are read in several threads."""

    def get_range(self, uri: str, start: int, stop: int, *, etag: str | None = None) -> bytes:
        data = super().get_range(uri, start, stop, etag=etag)
        with self.lock:
            self.read += len(data)
        return data


def fill(
    rank: int, size: int, port: int, sharding: Sharding, folder: str, endpoint: str,
    keys: Credentials, objects: list[ObjectInfo], out: str, purpose: Purpose = TEXT,
    method: dict[str, Any] | None = None, precision: str = "FP32",
) -> None:  # fmt: skip
    """Open a model from object storage. Rank 0 writes the gathered tensors; each rank writes the
    bytes that it read and holds, and the number of placeholders left."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": "2" if sharding == "HybridShard" else str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    store = Counting(endpoint, credentials=keys)
    spec = parse_spec(
        {
            "model": {"source": "s3://models/base"},
            "data": {"train": [{"source": "s3://data/a.jsonl"}]},
            "output": {"destination": "s3://models/tuned"},
            "task": purpose.task,
            "method": method or {"type": "Full"},
            "training": {"precision": precision},
        }
    )
    world = join(spec)
    stores: Any = SimpleNamespace(of=lambda access: store)
    opened = open_model(
        spec, BaseFiles(Base(spec.model, ()), Path(folder), None, tuple(objects)), stores, world,
        Placement(sharding, False), precision_of(spec, cuda=False), purpose, True,
    )  # fmt: skip
    model = opened.model
    found = {name: whole(p.detach()).clone() for name, p in model.named_parameters()}
    buffers = {name: b for name, b in model.named_buffers() if not name.endswith(".salt")}
    held = sum(
        p.to_local().nbytes if isinstance(p, DTensor) else p.nbytes for p in model.parameters()
    )
    gc.collect()
    left = sum(type(o) is nn.Parameter and is_placeholder(o) for o in gc.get_objects())
    name = "whole.pt" if rank == 0 else f"whole-{rank}.pt"
    torch.save((found, buffers), f"{out}/{name}")
    torch.save((store.read, held, left), f"{out}/{rank}.pt")
    world.close()
