"""One optimizer step, from the rows of a global batch to changed weights."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from finetune_trainer.engine.loss import RowLosses
from finetune_trainer.engine.optimizers import step_if
from finetune_trainer.engine.rows.feed import StepTensors
from finetune_trainer.engine.rows.layout import row_context
from finetune_trainer.engine.sharding import synchronise
from finetune_trainer.engine.shards import whole
from finetune_trainer.train.session import Session


def optimizer_step(session: Session, batch: StepTensors, rate: float) -> tuple[Tensor, Tensor]:
    """One step of the optimizer on a global batch, if the guard lets it. A batch whose samples are
    all left out has no loss: its zero is in no mean.

    Returns:
        What this rank adds to ``LoopState.pending`` (float64, on the device, shape
        [5 + 2 * sources]), and the norm of the gradient before clipping. Neither has been waited
        for.
    """
    gang, sources = session.gang, session.plan.source_count
    loss = torch.zeros(1, dtype=torch.float64, device=gang.device)
    beside = torch.zeros(3, dtype=torch.float64, device=gang.device)
    by_source = torch.zeros(2, sources, dtype=torch.float64, device=gang.device)
    supervised = max(1, batch.plan.supervised)
    for i, row in enumerate(batch.rows):
        last = i == len(batch.rows) - 1
        synchronise(session.module, last)
        torch.manual_seed(generator_seed(session, batch, i))
        with gang.autocast():
            untuned = session.output_anchor.outputs(row) if session.output_anchor else None
        with row_context(row.layout):
            with gang.autocast():
                losses: RowLosses = session.module(row, untuned)
            # Gradients are averaged over ranks: the size of the gang makes the average a sum.
            share: Tensor = (losses.tokens.sum() + losses.added) * (gang.size / supervised)
            share.backward()  # type: ignore[no-untyped-call]
        tokens = losses.tokens.detach().double()
        loss += tokens.sum() / supervised
        beside[0] += losses.drift.sum()
        beside[1] += losses.drift.numel()
        beside[2] += losses.router * (row.labels.numel() / supervised)
        if row.labels.numel():
            by_source[0].index_add_(0, row.sources, tokens)
            by_source[1].index_add_(0, row.sources, torch.ones_like(tokens))
    limit = float(session.spec.training.max_grad_norm) or float("inf")
    norm = whole(torch.nn.utils.clip_grad_norm_(session.trained, limit))
    # Summed with the loss, so that every rank judges by the same bits.
    found = gang.sum_on_device(torch.stack([loss[0], norm.double() / gang.size]))
    learns = bool(batch.plan.samples)
    taken = session.guard.judge(batch.plan.number, found[0], found[1], learns=learns)
    if session.weight_anchor is not None:
        session.weight_anchor.pull(rate, taken)
    step_if(session.optimizers, rate, taken)
    steps = torch.full_like(loss, learns / gang.size)
    sums = torch.cat([loss, steps, beside, by_source.flatten()])
    return torch.where(taken, sums, torch.zeros_like(sums)), norm


def generator_seed(session: Session, batch: StepTensors, turn: int) -> int:
    """Seed of torch's generators, on every device, for a rank's row of a step.

    Dropout and noise are keyed (``dropout``) and draw from no generator. A model may draw by itself
    (the router of PhiMoE samples experts): by seed, step and sample, so that checkpoints keep no
    generator, and a run that goes on, at any number of ranks, draws what it would have drawn.
    """
    ranks, gang = batch.plan.rows, session.gang  # processes that share rows are one rank
    row = ranks[gang.rank * len(ranks) // gang.size][turn]
    key = f"{session.plan.seed} {batch.plan.number} {row[0] if row else -1}"
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big")
