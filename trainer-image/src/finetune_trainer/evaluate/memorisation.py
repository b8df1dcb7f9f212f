"""Memorisation: training answers that the tuned model reproduces word for word.

Greedy decoding writes an answer exactly if each of its tokens is the likeliest one after those
before. So one forward pass over prompts and answers decides it, and nothing is generated.

Answers that follow from their prompts are reproduced too, so the same is done with held-out
samples: what is reproduced more often in training was learned by heart (Carlini et al. 2023,
arXiv:2202.07646, ask for the next 50 tokens of a document).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from finetune_trainer.engine.loss import MicroBatchLosses, evaluating
from finetune_trainer.engine.packing.layout import layout_context
from finetune_trainer.engine.planning.plan import pack_all
from finetune_trainer.evaluate.measure import Evaluator
from finetune_trainer.liveness import progressed
from finetune_trainer.prepared.dataset import AnsweredPrompt, PreparedData, TokenSample
from finetune_trainer.prepared.split import HELD_OUT, Side
from finetune_trainer.storage.runfiles import Memorisation, Reproduced

SAMPLES: Final = 64
"""Samples that are asked for, of training and held out."""
TOKENS: Final = 32
"""Tokens of an answer that are compared: longer than what is reproduced by chance."""
_MICRO_BATCH_TOKENS: Final = 1024
"""Bounds the logits, which are kept."""


def memorisation(evaluator: Evaluator, trained: Sequence[int], seed: int) -> Memorisation | None:
    """Return how many answers the model reproduces, identical on all ranks; None: no training
    sample has an answer of ``TOKENS`` tokens.

    Args:
        trained: index positions of the samples that the model was trained on.
        seed: of the choice of samples.
    """
    draw, data = np.random.default_rng(seed), evaluator.data
    chosen = beginnings(data, "train", np.asarray(trained, np.int64), draw)
    if not chosen:
        return None
    held_out: list[TokenSample] = []
    for side in HELD_OUT:
        held_out += beginnings(data, side, np.arange(len(data.index(side))), draw)
    return Memorisation(
        tokens=TOKENS,
        training=reproduced(evaluator, chosen),
        held_out=reproduced(evaluator, held_out[:SAMPLES]),
    )


def beginnings(
    data: PreparedData, side: Side, positions: npt.NDArray[np.int64], draw: np.random.Generator
) -> list[TokenSample]:
    """Return at most ``SAMPLES`` of the samples up to the first ``TOKENS`` tokens of the (last)
    answer, which alone are supervised."""
    long = positions[data.index(side).supervised[positions] >= TOKENS]
    some = draw.permutation(long)[:SAMPLES].tolist()
    found = map(_beginning, data.answered_prompts(side, some))
    return [sample for sample in found if sample is not None]


def _beginning(sample: AnsweredPrompt) -> TokenSample | None:
    # A document has no prompt, at most a token that marks its begin: its first tokens are one.
    start = sample.prompt_length if sample.prompt_length > 1 else TOKENS
    if len(sample.ids) < start + TOKENS:
        return None
    supervised = np.arange(start + TOKENS) >= start
    return TokenSample(sample.ids[: start + TOKENS], supervised)


def reproduced(evaluator: Evaluator, samples: Sequence[TokenSample]) -> Reproduced:
    """Count the samples of which every supervised token is the likeliest one."""
    lengths = np.array([len(sample.ids) for sample in samples], np.int64)
    misses = np.zeros(len(samples))
    if not samples:
        return Reproduced(samples=0, reproduced=0)
    world, virtual = evaluator.world, evaluator.virtual_tokens
    capacity = max(_MICRO_BATCH_TOKENS, int(lengths.max()) + virtual)
    dealt = pack_all(lengths, capacity, world.size, evaluator.packing, virtual)
    with evaluating(evaluator.loss), torch.no_grad():
        for numbers in dealt[world.rank]:
            progressed()
            micro_batch = evaluator.build(
                [samples[i] for i in numbers], numbers, numbers=numbers, seed=0, step=0,
                device=world.device,
            )  # fmt: skip
            with world.autocast(), layout_context(micro_batch.layout):
                found: MicroBatchLosses = evaluator.loss(micro_batch, with_logits=True)
            assert found.logits is not None, "requested by with_logits"
            missed = (found.logits.argmax(-1) != micro_batch.labels).double().cpu().numpy()
            np.add.at(misses, micro_batch.numbers.cpu().numpy(), missed)
    exact = int((world.sum(torch.from_numpy(misses)) == 0).sum())
    return Reproduced(samples=len(samples), reproduced=exact)
