"""Worker of test_gradients: one optimizer step of a small world."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from engine import CPU, samples, spec_of, tiny_llama

from finetune_api.training import Guard as GuardRule
from finetune_api.training import Training
from finetune_trainer.engine.chunked_head import ChunkedHead
from finetune_trainer.engine.dtensors import whole
from finetune_trainer.engine.guard import Guard
from finetune_trainer.engine.loss import TokenLoss
from finetune_trainer.engine.packing.feed import Feed, build_packed
from finetune_trainer.engine.planning.plan import Plan
from finetune_trainer.engine.precision import FP32
from finetune_trainer.engine.sharding import Sharding, distribute
from finetune_trainer.engine.tuning.anchors import OutputAnchor
from finetune_trainer.engine.tuning.methods import apply_method
from finetune_trainer.engine.world import join
from finetune_trainer.train.step import optimizer_step

LENGTHS = [60, 50, 55, 45, 30, 20, 64, 35]


def adapted() -> torch.nn.Module:
    """A model whose adapter changes the outputs."""
    spec = spec_of({"type": "LoRA", "lora": {"rank": 4}})
    model = apply_method(tiny_llama(), spec)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def gradient(
    rank: int, size: int, port: int, micro_batch_tokens: int, count: int, folder: str,
    sharding: Sharding = "NoShard", sharing: int = 1, anchor: str = "",
    chunk: int = 0,
) -> None:  # fmt: skip
    """Write the gradient of one optimizer step, as the training loop computes it, to a file.

    Args:
        anchor: every other document is anchored to the outputs of a 'copy', or to those without the
            'adapter'; empty: none.
        chunk: tokens whose logits are computed at a time; 0: all.
    """
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "LOCAL_WORLD_SIZE": str(size // 2 if sharding == "HybridShard" else size),
    }  # fmt: skip
    torch.set_num_threads(1)
    world = join(spec_of({"type": "Full"}, precision="FP32"))
    documents = samples(LENGTHS)[:count]
    lengths = torch.tensor(LENGTHS[:count]).numpy()
    supervised = torch.tensor([int(s.supervised.sum()) for s in documents]).numpy()
    plan = Plan(
        lengths, supervised, batch_size=count, seed=0, micro_batch_tokens=micro_batch_tokens,
        ranks=size // sharing, sources=np.arange(count) % 2,
    )  # fmt: skip
    loss = TokenLoss(adapted() if anchor == "adapter" else tiny_llama(), 0.0, 0.0, 2.0).train()
    if chunk:
        loss._chunks = ChunkedHead(loss.model, limit=4 * 97 * chunk)
    context = world.context_group(sharing)
    module = distribute(loss, world, sharding, FP32)
    copy = TokenLoss(tiny_llama(seed=1).requires_grad_(False)).eval()
    distribute(copy, world, sharding, FP32)
    parameters = [p for p in loss.parameters() if p.requires_grad]
    kept: list[torch.Tensor] = []

    class Keep(torch.optim.SGD):
        """An optimizer that keeps the gradient instead of using it."""

        def step(self, closure=None):
            kept.append(torch.cat([whole(p.grad).flatten() for p in parameters]))

    session = SimpleNamespace(
        world=world, plan=plan, module=module, guard=Guard(GuardRule(), CPU), trained=parameters,
        optimizers=[Keep([{"params": parameters, "rate_factor": 1.0}], lr=0.0)],
        output_anchor=OutputAnchor(loss, copy if anchor == "copy" else None) if anchor else None,
        weight_anchor=None,
        spec=SimpleNamespace(training=Training.model_validate({"maxGradNorm": "0"})),
    )  # fmt: skip
    read = lambda positions: [documents[p] for p in positions]  # noqa: E731
    build = partial(build_packed, context=context)
    with Feed(
        plan, read, rank=rank // sharing, start=0, end=1, device=CPU, build=build,
        replay=[False, bool(anchor)],
    ) as feed:  # fmt: skip
        for batch in feed:
            local, _, by_sample = optimizer_step(session, batch, 0.0)
    total = world.sum(torch.cat([local[[0, 2]], by_sample.flatten()]))
    if rank == 0:
        micro_batches = len(batch.micro_batches)
        torch.save((kept[0], total.tolist(), micro_batches), Path(folder) / "gradient.pt")
    world.close()
