"""Worker of test_sharding, test_precision and test_optimizers: a few steps of a small world, with
any method, sharding, precision and optimizer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from engine import CPU, samples, tiny_llama, tiny_mixtral
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from finetune_api.spec import parse_spec
from finetune_trainer.engine.base import BaseFiles
from finetune_trainer.engine.checkpointing.dcp import load_state, save_state, state_of
from finetune_trainer.engine.checkpointing.staging import stage
from finetune_trainer.engine.dtensors import whole
from finetune_trainer.engine.guard import Guard
from finetune_trainer.engine.loss import evaluating
from finetune_trainer.engine.memory.estimate import Placement
from finetune_trainer.engine.model import TEXT
from finetune_trainer.engine.optimizers import make_optimizers
from finetune_trainer.engine.packing.context import ALONE
from finetune_trainer.engine.packing.feed import Feed, StaticShape
from finetune_trainer.engine.planning.plan import Plan
from finetune_trainer.engine.precision import precision_of
from finetune_trainer.engine.sharding import root_gathered
from finetune_trainer.engine.task_losses import TASKS
from finetune_trainer.engine.world import join
from finetune_trainer.storage.published import Base
from finetune_trainer.train.step import optimizer_step
from finetune_trainer.train.tuned import open_model

NO_STORES: Any = None
"""The model is in a local folder."""
LENGTHS = [30, 24, 41, 18, 33, 27]
TOKENS = 45


def tune(
    rank: int, size: int, port: int, method: dict[str, Any], sharding: Any, folder: str,
    training: Mapping[str, Any] = MappingProxyType({}), start: int = 0, end: int = 2,
    checkpoint: str | None = None, checkpointing: bool = False, experts: bool = False,
    apart: bool = False,
) -> None:  # fmt: skip
    """Train some steps, and write the trained weights and one greedy answer to a file, and a
    checkpoint beside it. With HybridShard, half of the processes are a node.

    Args:
        checkpoint: folder of the checkpoint to resume from.
        experts: whether the model is a mixture of experts.
        apart: whether each document has a micro-batch of its own, so that micro-batches are the
            same in worlds of any size.
    """
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size // 2 if sharding == "HybridShard" else size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    spec = parse_spec(
        {
            "model": {"source": "s3://models/base"},
            "data": {"train": [{"source": "s3://data/a.jsonl"}]},
            "output": {"destination": "s3://models/tuned"},
            "method": method,
            "training": {"precision": "FP32", **training},
        }
    )
    world = join(spec)
    files = BaseFiles(Base(spec.model, ()), Path(folder) / "base", None)
    width = 64 if spec.method.kind.quantizes else 32  # whole quantisation blocks, for a CPU
    make = tiny_mixtral if experts else partial(tiny_llama, hidden_size=width)
    world.on_main(lambda: make().save_pretrained(files.folder))
    opened = open_model(
        spec, files, NO_STORES, world, Placement(sharding, checkpointing),
        precision_of(spec, cuda=False), TEXT, True,
    )  # fmt: skip
    model, loss, module = opened.model, opened.loss, opened.module
    documents = samples(LENGTHS)
    lengths = np.array(LENGTHS)
    supervised = np.array([int(s.supervised.sum()) for s in documents])
    plan = Plan(
        lengths, supervised, batch_size=3, seed=0, micro_batch_tokens=TOKENS, ranks=size,
        packing="Unpacked" if apart else opened.packing,
    )  # fmt: skip
    session: Any = SimpleNamespace(
        world=world, plan=plan, module=module, spec=spec, guard=Guard(spec.training.guard, CPU),
        trained=[p for p in loss.parameters() if p.requires_grad],
        optimizers=make_optimizers(model, spec), output_anchor=None, weight_anchor=None,
    )  # fmt: skip
    read = lambda positions: [documents[p] for p in positions]  # noqa: E731
    if checkpoint is not None:
        load_state(FileSystemReader(checkpoint), model, session.optimizers, world.control)
    shape = StaticShape(TOKENS, max(LENGTHS)) if spec.training.compile else None
    build = TASKS["CausalLM"].builder(plan.packing, ALONE, shape, True)
    with Feed(plan, read, rank=rank, start=start, end=end, device=CPU, build=build) as feed:
        for batch in feed:
            optimizer_step(session, batch, 1e-2)
    staged = stage(state_of(model, session.optimizers), world.control)
    save_state(FileSystemWriter(Path(folder) / "checkpoint"), staged, world.control)
    with evaluating(loss), torch.no_grad(), root_gathered(loss):
        answer = model.generate(
            input_ids=torch.tensor([[3, 5, 7, 9]]), do_sample=False, max_new_tokens=4,
            synced_gpus=size > 1,
        )  # fmt: skip
    weights = {
        name: whole(p.detach()).clone() for name, p in model.named_parameters() if p.requires_grad
    }
    if rank == 0:
        torch.save((weights, answer), Path(folder) / "tuned.pt")
    world.close()
