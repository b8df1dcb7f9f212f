"""One optimizer step: from the micro-batches of a global batch to updated weights."""

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
from finetune_trainer.liveness import progressed
from finetune_trainer.train.session import Session


def optimizer_step(
    session: Session, batch: StepTensors, rate: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Run an optimizer step on a global batch; the guard may skip the update. A batch whose samples
    are all left out has zero loss and is excluded from all means.

    Returns:
        This rank's summand of ``LoopState.pending`` (float64, on the device, shape
        [5 + 2 * sources]), the gradient norm before clipping, and this rank's sums of each sample
        before the update, taken or not: loss, number of labels, label ids (float64, shape
        [3, samples]). None synchronizes the device.
    """
    world, sources = session.world, session.plan.source_count
    loss = torch.zeros(1, dtype=torch.float64, device=world.device)
    auxiliary = torch.zeros(3, dtype=torch.float64, device=world.device)
    by_source = torch.zeros(2, sources, dtype=torch.float64, device=world.device)
    by_sample = by_source.new_zeros(3, len(batch.plan.samples))
    supervised = max(1, batch.plan.supervised)
    for i, micro_batch in enumerate(batch.micro_batches):
        progressed()
        last = i == len(batch.micro_batches) - 1
        synchronise(session.module, last)
        torch.manual_seed(generator_seed(session, batch, i))
        with world.autocast():
            base = session.output_anchor.outputs(micro_batch) if session.output_anchor else None
        with layout_context(micro_batch.layout):
            with world.autocast():
                losses: MicroBatchLosses = session.module(micro_batch, base)
            # DDP and FSDP average gradients over ranks; the world size turns the mean into a sum.
            share: Tensor = (losses.tokens.sum() + losses.added) * (world.size / supervised)
            share.backward()  # type: ignore[no-untyped-call]
        tokens = losses.tokens.detach().double()
        loss += tokens.sum() / supervised
        auxiliary[0] += losses.drift.sum()
        auxiliary[1] += losses.drift.numel()
        auxiliary[2] += losses.router * (micro_batch.labels.numel() / supervised)
        if micro_batch.labels.numel():
            by_sample[0].index_add_(0, micro_batch.numbers, tokens)
            by_sample[1].index_add_(0, micro_batch.numbers, torch.ones_like(tokens))
            by_sample[2].index_add_(0, micro_batch.numbers, micro_batch.labels.double())
    by_source.index_add_(1, batch.sources, by_sample[:2])
    limit = float(session.spec.training.max_grad_norm) or float("inf")
    norm = whole(torch.nn.utils.clip_grad_norm_(session.trained, limit))
    # All-reduced with the loss, so that the guard sees the same bits on every rank.
    found = world.sum_on_device(torch.stack([loss[0], norm.double() / world.size]))
    learns = bool(batch.plan.samples)
    taken = session.guard.judge(batch.plan.number, found[0], found[1], learns=learns)
    if session.weight_anchor is not None:
        session.weight_anchor.pull(rate, taken)
    step_if(session.optimizers, rate, taken)
    steps = torch.full_like(loss, learns / world.size)
    sums = torch.cat([loss, steps, auxiliary, by_source.flatten()])
    return torch.where(taken, sums, torch.zeros_like(sums)), norm, by_sample


def generator_seed(session: Session, batch: StepTensors, turn: int) -> int:
    """Return the seed of torch's generators, on all devices, for a rank's micro-batch of a step.

    Dropout and noise use keys (``dropout``) instead of generators, but some models draw from one
    themselves (the router of PhiMoE samples experts). The seed depends on the run's seed, the step
    and the micro-batch's first sample. So checkpoints need no generator state, and a resumed run
    draws the same values at any number of ranks.
    """
    # A context-parallel group counts as one rank of the plan.
    ranks, world = batch.plan.micro_batches, session.world
    micro_batch = ranks[world.rank * len(ranks) // world.size][turn]
    key = f"{session.plan.seed} {batch.plan.number} {micro_batch[0] if micro_batch else -1}"
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big")
