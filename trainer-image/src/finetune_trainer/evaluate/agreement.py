"""Whether a published model is the tested one: which samples are compared, and what may differ.

The same weights give other sums on another device, in another order or in another number format.
So losses agree within a bound, which depends on the number formats, and some greedy answers may
differ: where two tokens are about equally likely, a rounding decides, and all that follows differs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from finetune_trainer.engine.precision import Precision

Ids = npt.NDArray[np.int32]

SHORT: Final = 512
"""Tokens of the samples that are preferred: they bound the time on a CPU."""
_REPLACEMENT: Final = "\ufffd"
"""Stands for the bytes of a character that a cut left incomplete."""


@dataclass(frozen=True)
class Bound:
    """What may differ between the tested and the published model."""

    sample: float
    """Largest difference of a sample's loss, as a multiple of 1 nat + the tested loss: losses far
    above 1 come from large logits, which round more."""
    mean: float
    """Largest difference of the mean loss, as a multiple of 1 nat + the tested mean. It is at most
    that of a sample, because roundings of different samples cancel."""
    differing: float
    """Largest share of answers that differ. One answer more may: a few samples decide nothing."""


_EXACT: Final = Bound(sample=1e-3, mean=1e-3, differing=0.1)
_HALF: Final = Bound(sample=0.25, mean=0.05, differing=0.8)
_COARSE: Final = Bound(sample=1.0, mean=0.3, differing=1.0)


def bound_of(tested: Precision, quantized: bool, published: torch.dtype) -> Bound:
    """Return the bound for the number formats of both models.

    - float32 in both: 1e-3. Only the order of sums differs, some 1e-5 in practice.
    - 16 bits in either: 0.25 for a sample and 0.05 for the mean. bfloat16 keeps 8 bits of a weight
      or an activation, and a label of one token does not average its roundings. After a few dozen
      tokens most answers may have met a tie.
    - Tested with weights in 4 or 8 bits (QLoRA, FP8): 1.0 and 0.3, and any answer. The published
      model runs on the weights in 16 or 32 bits, not on the rounded ones that it was tested with.

    Args:
        tested: precision of the test.
        quantized: whether the base was in 4 bits then.
        published: dtype of the weights as published.
    """
    if quantized or tested.fp8:
        return _COARSE
    return _HALF if tested.bf16 or published != torch.float32 else _EXACT


def choose(lengths: Sequence[npt.NDArray[np.int32]], most: int) -> list[list[int]]:
    """Choose samples to compare, always the same ones: at most ``most``, spread over the sets and
    evenly within each, of at most ``SHORT`` tokens; of a set without such a one, the shortest.

    Args:
        lengths: tokens of the samples of each set, shape [samples].

    Returns:
        Numbers of the chosen samples of each set, ascending.
    """
    chosen: list[list[int]] = [[] for _ in lengths]
    by_size = sorted((n for n, of in enumerate(lengths) if len(of)), key=lambda n: len(lengths[n]))
    for done, number in enumerate(by_size):
        of = lengths[number]
        short = np.flatnonzero(of <= SHORT)
        if not len(short):
            short = np.array([of.argmin()])
        take = min(math.ceil(most / (len(by_size) - done)), len(short))
        chosen[number] = short[np.linspace(0, len(short) - 1, take).round().astype(int)].tolist()
        most -= take
    return chosen


class Outcome(NamedTuple):
    """What a published model did with a sample."""

    loss: float
    """Mean loss of its labels in nats."""
    same_answer: bool | None = None
    """Whether its answer is the tested one; None: not compared."""


class Agreement(NamedTuple):
    """A comparison of the outcomes of all samples."""

    largest: float
    """Largest difference of the loss of a sample, nats per label."""
    equal: int
    """Answers that are equal."""
    of: int
    """Answers compared."""
    difference: str | None
    """What differs by more than the bound, in words; None: the models agree."""


def compare(
    tested: Sequence[float], found: Sequence[Outcome], names: Sequence[str], bound: Bound
) -> Agreement:
    """Compare the tested losses, in nats per label, with the outcomes of the same samples."""
    before, after = np.array(tested), np.array([outcome.loss for outcome in found])
    apart = np.abs(after - before)
    apart[np.isnan(apart)] = np.inf
    answers = [outcome.same_answer for outcome in found if outcome.same_answer is not None]
    equal, of = sum(answers), len(answers)
    excess = apart / (bound.sample * (1 + before))
    worst = int(excess.argmax())
    mean, allowed = float(before.mean()), bound.mean * (1 + float(before.mean()))
    difference = None
    if excess[worst] > 1:
        difference = (
            f"{names[worst]} has loss {after[worst]:.6g}, tested {before[worst]:.6g} nats per label"
            f" (allowed difference {bound.sample * (1 + before[worst]):.2g})"
        )
    elif abs(float(after.mean()) - mean) > allowed:
        difference = (
            f"the mean loss of {len(after)} samples is {after.mean():.6g}, tested {mean:.6g} nats"
            f" per label (allowed difference {allowed:.2g})"
        )
    elif of - equal > 1 + math.floor(bound.differing * of):
        first = next(
            name for name, outcome in zip(names, found, strict=True) if outcome.same_answer is False
        )
        difference = (
            f"{of - equal} of {of} answers differ from the tested ones, first that to {first}"
            f" (allowed: {1 + math.floor(bound.differing * of)}), at losses that agree"
        )
    return Agreement(float(apart.max()), equal, of, difference)


def same_answer(tested: str, said: str, ended: bool, *, must_end: bool) -> bool:
    """Return whether a greedy answer is the tested one, as far as both were generated.

    Args:
        said: text of the published model.
        ended: whether it ended by an end token, not by its limit of tokens.
        must_end: whether the tested answer ended within that limit.
    """
    if ended:
        return said == tested
    return not must_end and tested.startswith(said.rstrip(_REPLACEMENT))


def same_tokens(
    prepared: Ids, tokens: Sequence[int], answered: int = 0, *, cut: bool = False
) -> bool:
    """Return whether a tokenizer makes the prepared tokens of a text, as the beginning of its own:
    some put an end token behind each text.

    In a conversation with earlier answers the prepared parts were tokenized one by one, which may
    differ at their borders; then the part behind the last earlier answer is compared, without its
    first token.

    Args:
        prepared: shape [tokens].
        tokens: of the whole text.
        answered: position behind the last earlier answer; 0: there is none.
        cut: whether the sample may have been shortened, to the first and last tokens of its text.
    """
    ours, theirs = prepared.tolist(), list(tokens)
    behind = _common(ours[::-1], theirs[::-1])
    if answered:
        return behind >= len(ours) - answered - 1
    if len(ours) > len(theirs):
        return False
    return _common(ours, theirs) + (behind if cut else 0) >= len(ours)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common beginning of two sequences."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
