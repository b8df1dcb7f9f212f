"""The feed of a run that is interrupted and resized: the micro-batches that it builds."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import islice

import numpy as np
from engine import CPU
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainer.engine.packing.feed import Feed, MicroBatch, StepTensors, TokenMicroBatch
from finetune_trainer.engine.planning.mixture import Stage
from finetune_trainer.engine.planning.plan import Plan
from finetune_trainer.prepared.dataset import TokenSample

SAMPLES, BATCH, VISITS = 60, 8, 180
STEPS = -(-VISITS // BATCH)
LENGTHS = np.random.default_rng(0).integers(5, 200, SAMPLES)
SOURCES = np.random.default_rng(1).integers(0, 3, SAMPLES)
# A token id encodes its sample and its position in the sample; 0 is padding.
DOCUMENTS = [
    TokenSample(np.arange(n, dtype=np.int32) + 256 * (i + 1), np.arange(n) > n // 2)
    for i, n in enumerate(LENGTHS)
]
SUPERVISED = np.array([int(d.supervised.sum()) for d in DOCUMENTS])

Trained = tuple[int, list[int]]
"""A step, and the samples of its micro-batches in the order of the index."""


def read(positions: Sequence[int]) -> list[TokenSample]:
    return [DOCUMENTS[p] for p in positions]


def samples_of(step: StepTensors, micro_batch: MicroBatch) -> list[int]:
    """Return the samples of a micro-batch; check their tokens, positions, labels and numbers."""
    assert isinstance(micro_batch, TokenMicroBatch)
    found, start = [], 0
    ids, places = micro_batch.input_ids[0].numpy(), micro_batch.position_ids[0].numpy()
    for span in micro_batch.layout.spans:
        tokens = ids[start : start + span.q_len]
        if tokens[0]:
            found.append(int(tokens[0]) // 256 - 1)
            np.testing.assert_array_equal(tokens, DOCUMENTS[found[-1]].ids)
        np.testing.assert_array_equal(places[start : start + span.q_len], np.arange(len(tokens)))
        start += span.q_len
    learned = [DOCUMENTS[p].ids[DOCUMENTS[p].supervised] for p in found]
    np.testing.assert_array_equal(micro_batch.labels.numpy(), np.concatenate([[], *learned]))
    np.testing.assert_array_equal(
        np.array(step.plan.samples)[micro_batch.numbers.numpy()],
        micro_batch.labels.numpy() // 256 - 1,
    )
    return found


def trained(ranks: Sequence[StepTensors]) -> Trained:
    """Return what all ranks train in one step."""
    numbers = {step.plan.number for step in ranks}
    assert len(numbers) == 1
    assert len({len(step.micro_batches) for step in ranks}) == 1, "ranks synchronize after each"
    for step in ranks:
        np.testing.assert_array_equal(step.sources.numpy(), SOURCES[list(step.plan.samples)])
    return numbers.pop(), sorted(
        p
        for step in ranks
        for micro_batch in step.micro_batches
        for p in samples_of(step, micro_batch)
    )


def world(plan: Plan, start: int, steps: int) -> list[Trained]:
    """Return steps of a world that is killed after them, with later steps already built."""
    with ExitStack() as stack:
        feeds = [
            stack.enter_context(
                Feed(plan, read, rank=rank, start=start, end=STEPS, device=CPU, ahead=2)
            )
            for rank in range(plan.ranks)
        ]
        return [trained(ranks) for ranks in islice(zip(*feeds, strict=True), steps)]


STAGES = st.lists(
    st.builds(
        Stage, st.integers(1, 12),
        st.none() | st.lists(st.floats(0.1, 1), min_size=3, max_size=3),
    ),
    min_size=1,
    max_size=3,
)  # fmt: skip
ATTEMPTS = st.lists(
    st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(0, 3)), min_size=1, max_size=6
)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), stages=STAGES, attempts=ATTEMPTS)
def test_an_interrupted_and_resized_run_feeds_the_same_samples(
    seed: int, stages: list[Stage], attempts: list[tuple[int, int, int]]
) -> None:
    """Each attempt has a world size, runs some steps, and loses those since its checkpoint."""

    def plan(ranks: int) -> Plan:
        return Plan(
            LENGTHS, SUPERVISED, batch_size=BATCH, seed=seed, micro_batch_tokens=256, ranks=ranks,
            sources=SOURCES, stages=stages, visits=VISITS,
        )  # fmt: skip

    whole = plan(1)
    expected = world(whole, 0, STEPS)
    assert expected == [(n, sorted(whole.samples(n).tolist())) for n in range(STEPS)]
    kept: list[Trained] = []
    for size, steps, lost in attempts:
        kept += world(plan(size), len(kept), steps)
        del kept[max(len(kept) - lost, 0) :]
    kept += world(plan(attempts[0][0]), len(kept), STEPS)
    assert kept == expected
