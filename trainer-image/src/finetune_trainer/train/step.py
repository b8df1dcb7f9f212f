"""One optimizer step, from the rows of a global batch to changed weights."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from finetune_trainer.engine.dtensors import whole
from finetune_trainer.engine.loss import MicroBatchLosses
from finetune_trainer.engine.optimizers import step_if
from finetune_trainer.engine.packing.feed import StepTensors
from finetune_trainer.engine.packing.layout import layout_context
from finetune_trainer.engine.sharding import synchronise
from finetune_trainer.train.session import Session


def optimizer_step(session: Session, batch: StepTensors, rate: float) -> tuple[Tensor, Tensor]:
    """One step of the optimizer on a global batch, if the guard lets it. A batch whose samples are
    all left out has no loss: its zero is in no mean.

    Returns:
        What this rank adds to ``LoopState.pending`` (float64, on the device, shape
        [5 + 2 * sources]), and the norm of the gradient before clipping. Neither has been waited
        for.
    """
    world, sources = session.world, session.plan.source_count
    loss = torch.zeros(1, dtype=torch.float64, device=world.device)
    beside = torch.zeros(3, dtype=torch.float64, device=world.device)
    by_source = torch.zeros(2, sources, dtype=torch.float64, device=world.device)
    supervised = max(1, batch.plan.supervised)
    for i, micro_batch in enumerate(batch.micro_batches):
        last = i == len(batch.micro_batches) - 1
        synchronise(session.module, last)
        torch.manual_seed(generator_seed(session, batch, i))
        with world.autocast():
            base = session.output_anchor.outputs(micro_batch) if session.output_anchor else None
        with layout_context(micro_batch.layout):
            with world.autocast():
                losses: MicroBatchLosses = session.module(micro_batch, base)
            # Gradients are averaged over ranks: the size of the gang makes the average a sum.
            share: Tensor = (losses.tokens.sum() + losses.added) * (world.size / supervised)
            share.backward()  # type: ignore[no-untyped-call]
        tokens = losses.tokens.detach().double()
        loss += tokens.sum() / supervised
        beside[0] += losses.drift.sum()
        beside[1] += losses.drift.numel()
        beside[2] += losses.router * (micro_batch.labels.numel() / supervised)
        if micro_batch.labels.numel():
            by_source[0].index_add_(0, micro_batch.sources, tokens)
            by_source[1].index_add_(0, micro_batch.sources, torch.ones_like(tokens))
    limit = float(session.spec.training.max_grad_norm) or float("inf")
    norm = whole(torch.nn.utils.clip_grad_norm_(session.trained, limit))
    # Summed with the loss, so that every rank judges by the same bits.
    found = world.sum_on_device(torch.stack([loss[0], norm.double() / world.size]))
    learns = bool(batch.plan.samples)
    taken = session.guard.judge(batch.plan.number, found[0], found[1], learns=learns)
    if session.weight_anchor is not None:
        session.weight_anchor.pull(rate, taken)
    step_if(session.optimizers, rate, taken)
    steps = torch.full_like(loss, learns / world.size)
    sums = torch.cat([loss, steps, beside, by_source.flatten()])
    return torch.where(taken, sums, torch.zeros_like(sums)), norm


def generator_seed(session: Session, batch: StepTensors, turn: int) -> int:
    """Seed of torch's generators, on every device, for a rank's row of a step.

    Dropout and noise are keyed (``dropout``) and draw from no generator. A model may draw by itself
    (the router of PhiMoE samples experts): by seed, step and sample, so that checkpoints keep no
    generator, and a run that goes on, at any number of ranks, draws what it would have drawn.
    """
    ranks, world = batch.plan.micro_batches, session.world  # processes that share rows are one rank
    micro_batch = ranks[world.rank * len(ranks) // world.size][turn]
    key = f"{session.plan.seed} {batch.plan.number} {micro_batch[0] if micro_batch else -1}"
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big")
