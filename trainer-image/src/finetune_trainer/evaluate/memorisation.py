"""Memorisation: training answers that the tuned model reproduces word for word.

Greedy decoding writes an answer exactly if each of its tokens is the likeliest one after those
before. So one forward pass over prompts and answers decides it, and nothing is generated.

Answers that follow from their prompts are reproduced too, so the same is done with held-out
samples: what is reproduced more often in training was learned by heart (Carlini et al. 2023,
arXiv:2202.07646, ask for the next 50 tokens of a document). Canaries are made-up secrets that the
user has put into the training data to find out whether they come out again (Carlini et al. 2019,
arXiv:1802.08232): all of them are asked for, whole.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
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
CANARIES: Final = 1024
"""Most canaries that are asked for."""
_MICRO_BATCH_TOKENS: Final = 1024
"""Bounds the logits, which are kept."""


def memorisation(
    evaluator: Evaluator, trained: Sequence[int], seed: int, canaries: Collection[str] = ()
) -> Memorisation | None:
    """Return how many answers the model reproduces, identical on all ranks; None: there are no
    canaries, and no training sample has an answer of ``TOKENS`` tokens.

    Args:
        trained: index positions of the samples that the model was trained on.
        seed: of the choice of samples.
        canaries: names of the training sets of canaries.
    """
    draw, data = np.random.default_rng(seed), evaluator.data
    secrets = [number for number, name in data.set_names("train") if name in canaries]
    of_canaries = np.isin(data.index("train").set, secrets)
    positions = np.asarray(trained, np.int64)
    chosen = beginnings(data, "train", positions[~of_canaries[positions]], draw)
    put_in = whole_answers(data, np.flatnonzero(of_canaries)[:CANARIES].tolist())
    if not chosen and not put_in:
        return None
    held_out: list[TokenSample] = []
    for side in HELD_OUT:
        held_out += beginnings(data, side, np.arange(len(data.index(side))), draw)
    return Memorisation(
        tokens=TOKENS,
        training=reproduced(evaluator, chosen),
        held_out=reproduced(evaluator, held_out[:SAMPLES]),
        canaries=reproduced(evaluator, put_in) if put_in else None,
    )


def whole_answers(data: PreparedData, positions: Sequence[int]) -> list[TokenSample]:
    """Return training samples whose (last) answer alone is supervised; of a document, its second
    half."""
    return [_whole(sample) for sample in data.answered_prompts("train", positions)]


def _whole(sample: AnsweredPrompt) -> TokenSample:
    count = len(sample.ids)
    start = sample.prompt_length if sample.prompt_length > 1 else max(1, count // 2)
    return TokenSample(sample.ids, np.arange(count) >= start)


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
