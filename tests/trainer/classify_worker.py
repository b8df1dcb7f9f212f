"""Worker of test_classification_world: two optimizer steps of a classifier in a small world."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from classifiers import documents
from engine import CPU

from finetune_api.spec import parse_spec
from finetune_trainer.engine.base import BaseFiles
from finetune_trainer.engine.dtensors import whole
from finetune_trainer.engine.guard import Guard
from finetune_trainer.engine.memory.estimate import Placement
from finetune_trainer.engine.model import purpose_of
from finetune_trainer.engine.packing.context import ALONE
from finetune_trainer.engine.packing.feed import Feed
from finetune_trainer.engine.parameters import optimizer_groups
from finetune_trainer.engine.planning.plan import Plan
from finetune_trainer.engine.precision import FP32
from finetune_trainer.engine.task_losses import TASKS
from finetune_trainer.engine.world import join
from finetune_trainer.storage.published import Base
from finetune_trainer.train.step import optimizer_step
from finetune_trainer.train.tuned import open_model

NO_STORES: Any = None
"""The model is in a local folder."""
LENGTHS = [30, 24, 41, 18, 33, 27, 12, 9]


def classify(
    rank: int, size: int, port: int, base: str, method: dict[str, Any], sharding: Any,
    micro_batch_tokens: int, folder: str,
) -> None:  # fmt: skip
    """Train two steps with dropout and noise; write weights, losses and shapes to a file."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size // 2 if sharding == "HybridShard" else size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    spec = parse_spec(
        {
            "task": "SequenceClassification",
            "model": {"source": "s3://models/base"},
            "data": {"train": [{"source": "s3://data/a.jsonl"}]},
            "output": {"destination": "s3://models/tuned"},
            "method": method,
            "training": {"precision": "FP32", "dropout": "0.1", "neftuneAlpha": "5"},
        }
    )
    world = join(spec)
    task = TASKS[spec.task]
    torch.rand(rank)  # earlier draws must not change the head
    purpose = purpose_of(spec, ["a", "b", "c"])
    opened = open_model(
        spec, BaseFiles(Base(spec.model, ()), Path(base), None), NO_STORES, world,
        Placement(sharding, False), FP32, purpose, True,
    )  # fmt: skip
    model = opened.model
    made = documents(LENGTHS)
    plan = Plan(
        np.array(LENGTHS), np.ones(len(LENGTHS), np.int64), batch_size=4, seed=0,
        micro_batch_tokens=micro_batch_tokens, ranks=size, packing=opened.packing,
    )  # fmt: skip
    session: Any = SimpleNamespace(
        world=world, plan=plan, spec=spec, guard=Guard(spec.training.guard, CPU),
        module=opened.module,
        trained=[p for p in opened.loss.parameters() if p.requires_grad],
        optimizers=[torch.optim.AdamW(optimizer_groups(model, spec), eps=1e-3, fused=True)],
        output_anchor=None, weight_anchor=None,
    )  # fmt: skip
    read = lambda positions: [made[p] for p in positions]  # noqa: E731
    sums, micro_batches = [], []
    build = task.builder(opened.packing, ALONE, None, True)
    with Feed(plan, read, rank=rank, start=0, end=2, device=CPU, build=build) as feed:
        for batch in feed:
            local, *_ = optimizer_step(session, batch, 1e-2)
            sums.append(world.sum(local.clone())[0].item())
            micro_batches.append(
                [tuple(micro_batch.input_ids.shape) for micro_batch in batch.micro_batches]
            )
    weights = {
        name: whole(p.detach()).clone() for name, p in model.named_parameters() if p.requires_grad
    }
    if rank == 0:
        torch.save((weights, sums, micro_batches), Path(folder) / "tuned.pt")
    world.close()
