"""The plan: a pure function, the same samples at any number of ranks, none lost or duplicated."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.engine.planning.mixture import Stage
from finetune_trainer.engine.planning.plan import (
    _PACK,
    Plan,
    cost,
    pack,
    pack_all,
    pack_padded,
    pack_singly,
    uniform_micro_batch,
)  # fmt: skip

lengths_of = st.lists(st.integers(1, 300), min_size=0, max_size=60)


@given(lengths_of, st.integers(300, 1000), st.integers(1, 5))
def test_every_document_is_packed_once_and_no_micro_batch_overflows(lengths, capacity, ranks):
    dealt = pack(lengths, capacity, ranks)
    assert sorted(
        i for micro_batches in dealt for micro_batch in micro_batches for i in micro_batch
    ) == list(range(len(lengths)))
    assert len({len(micro_batches) for micro_batches in dealt}) == 1
    assert all(
        sum(lengths[i] for i in micro_batch) <= capacity
        for micro_batches in dealt
        for micro_batch in micro_batches
    )


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(300, 1000))
def test_the_number_of_micro_batches_is_bounded(lengths, capacity):
    """Longest-processing-time-first, with the count raised on overflow: at most twice the
    micro-batches that the tokens need, plus one."""
    micro_batches = pack(lengths, capacity, 1)[0]
    assert len(micro_batches) <= 2 * -(-sum(lengths) // capacity) + 1


def test_ranks_are_balanced():
    lengths = [2000, 100, 100, 100, 1000, 900, 50, 50, 700, 300, 20, 10]
    dealt = pack(lengths, 4096, 2)
    costs = [
        sum(cost(lengths[i]) for micro_batch in micro_batches for i in micro_batch)
        for micro_batches in dealt
    ]
    assert max(costs) / min(costs) < 1.1


def test_a_document_above_the_capacity_is_refused():
    with pytest.raises(ValueError, match="301 tokens does not fit a micro-batch of 300"):
        pack([301], 300, 1)


def plan(n=37, batch=8, ranks=1, seed=5, **changes) -> Plan:
    lengths = np.random.default_rng(0).integers(5, 200, n)
    options = {
        "batch_size": batch,
        "seed": seed,
        "micro_batch_tokens": 512,
        "ranks": ranks,
    } | changes
    return Plan(lengths, lengths // 2, **options)


@given(st.integers(1, 80), st.integers(1, 20), st.integers(0, 2**31 - 1), st.integers(1, 4))
def test_an_epoch_trains_every_sample_once(n, batch, seed, ranks):
    p = plan(n, batch, ranks, seed, visits=3 * n)
    trained = []
    for step in range(-(-3 * n // min(batch, n))):
        made = p.step(step)
        micro_batches = sorted(
            i for rank in made.micro_batches for micro_batch in rank for i in micro_batch
        )
        assert micro_batches == sorted(made.samples)
        assert len(made.samples) == p.visited(step + 1) - p.visited(step) > 0
        trained += made.samples
    for epoch in range(3):
        assert sorted(trained[epoch * n : (epoch + 1) * n]) == list(range(n))


@given(st.integers(0, 40), st.lists(st.integers(1, 4), min_size=2, max_size=2))
def test_a_step_has_the_same_samples_and_denominator_at_any_number_of_ranks(step, ranks):
    one, other = (plan(ranks=r).step(step) for r in ranks)

    def samples(s):
        return sorted(i for rank in s.micro_batches for micro_batch in rank for i in micro_batch)

    assert samples(one) == samples(other)
    assert (one.supervised, one.tokens) == (other.supervised, other.tokens)


@given(st.integers(0, 2**31 - 1), st.lists(st.integers(1, 4), min_size=24, max_size=24), st.data())
def test_an_interrupted_and_resized_run_trains_the_same_samples(seed, ranks, data):
    """Every step uses a new plan with another number of ranks, as after an interruption."""
    lengths = np.random.default_rng(0).integers(5, 200, 60)
    sources = np.random.default_rng(1).integers(0, 3, 60)
    shares = st.none() | st.lists(st.floats(0.1, 1), min_size=3, max_size=3)
    stages = data.draw(st.lists(st.builds(Stage, st.integers(1, 12), shares), min_size=1))

    def made(size: int) -> Plan:
        return Plan(lengths, lengths // 2, batch_size=8, seed=seed, micro_batch_tokens=256,
                    ranks=size, sources=sources, stages=stages, visits=180)  # fmt: skip

    whole = made(1)
    for number, size in enumerate(ranks[:23]):
        expected, found = whole.step(number), made(size).step(number)
        micro_batches = sorted(
            p for rank in found.micro_batches for micro_batch in rank for p in micro_batch
        )
        assert micro_batches == sorted(expected.samples)
        assert found.samples == expected.samples
        assert (found.supervised, found.tokens) == (expected.supervised, expected.tokens)


@given(st.integers(0, 2**31 - 1), st.integers(1, 20), st.data())
def test_a_step_knows_the_samples_that_no_step_before_has(seed, batch, data):
    """At any number of sources and stages; samples that are left out are in no step."""
    sources = np.random.default_rng(1).integers(0, 3, 37)
    shares = st.none() | st.lists(st.floats(0.1, 1), min_size=3, max_size=3)
    stages = data.draw(st.lists(st.builds(Stage, st.integers(1, 12), shares), min_size=1))
    p = plan(37, batch, seed=seed, sources=sources, stages=stages, visits=150)
    p.leave_out(data.draw(st.sets(st.integers(0, 6), max_size=2)))
    seen = set()
    for number in range(-(-150 // batch)):
        step = p.step(number)
        fresh = [i for position, i in step.numbers.items() if position not in seen]
        assert step.first_visits == tuple(sorted(fresh))
        assert [step.samples[i] for i in step.numbers.values()] == list(step.numbers)
        seen.update(step.samples)


def test_orders_differ_by_epoch_and_by_seed():
    p = plan(64, 64)
    orders = [tuple(p.samples(0)), tuple(p.samples(1)), tuple(plan(64, 64, seed=6).samples(0))]
    assert len(set(orders)) == 3


def test_a_plan_is_the_same_when_made_again():
    assert plan().step(17) == plan().step(17)


@pytest.mark.parametrize("packing", _PACK)
def test_a_step_without_samples_has_an_empty_micro_batch_for_each_rank(packing):
    assert _PACK[packing]([], 8, 3) == [[[]]] * 3


def test_more_ranks_than_documents_leaves_empty_micro_batches():
    dealt = pack([5, 7], 100, 4)
    assert [len(micro_batches) for micro_batches in dealt] == [1, 1, 1, 1]
    assert sum(1 for micro_batches in dealt for micro_batch in micro_batches if micro_batch) == 2


@given(lengths_of, st.integers(1, 4))
def test_pack_singly_gives_each_document_its_own_micro_batch(lengths, ranks):
    dealt = pack_singly(lengths, 0, ranks)
    micro_batches = [micro_batch for rank in dealt for micro_batch in rank if micro_batch]
    assert sorted(i for micro_batch in micro_batches for i in micro_batch) == list(
        range(len(lengths))
    )
    assert all(len(micro_batch) == 1 for micro_batch in micro_batches)
    assert len({len(rank) for rank in dealt}) == 1


def padded(lengths, micro_batch):
    return len(micro_batch) * max((lengths[i] for i in micro_batch), default=0)


@given(lengths_of, st.integers(300, 1000), st.integers(1, 5))
def test_padded_micro_batches_hold_every_document_once_within_the_capacity(
    lengths, capacity, ranks
):
    dealt = pack_padded(lengths, capacity, ranks)
    micro_batches = [micro_batch for rank in dealt for micro_batch in rank]
    assert sorted(i for micro_batch in micro_batches for i in micro_batch) == list(
        range(len(lengths))
    )
    assert len({len(rank) for rank in dealt}) <= 1
    assert all(padded(lengths, micro_batch) <= capacity for micro_batch in micro_batches)
    # Documents of similar length: the ranges of lengths of micro-batches do not overlap.
    spans = sorted(
        (min(x), max(x))
        for x in ([lengths[i] for i in micro_batch] for micro_batch in micro_batches if micro_batch)
    )
    assert all(one[1] <= two[0] for one, two in itertools.pairwise(spans))


def test_padded_micro_batches_are_even_over_the_ranks():
    dealt = pack_padded([60] * 32, 2048, 4)
    assert [[len(micro_batch) for micro_batch in rank] for rank in dealt] == [[8]] * 4
    lengths = [200, 190, 180, 60, 60, 55, 50, 20, 10, 10]
    (first,), (second,) = pack_padded(lengths, 2048, 2)
    assert max(padded(lengths, first), padded(lengths, second)) <= 600


@given(lengths_of, st.integers(1, 3))
def test_one_pass_over_a_set_covers_it(lengths, ranks):
    dealt = pack_all(np.array(lengths, dtype=np.int64), 300, ranks)
    assert sorted(i for rank in dealt for micro_batch in rank for i in micro_batch) == list(
        range(len(lengths))
    )


@pytest.mark.parametrize(
    ("batch", "ranks", "least"), [(32, 1, 0.85), (32, 8, 0.5), (128, 2, 0.85), (512, 8, 0.9)]
)
def test_micro_batches_of_one_size_are_mostly_full(batch, ranks, least):
    draw = np.random.default_rng(1)
    lengths = np.clip(draw.lognormal(4.0, 0.6, 4000).astype(int), 8, 500)
    options = {"batch_size": batch, "seed": 0, "micro_batch_tokens": 2048, "ranks": ranks}
    p = Plan(lengths, lengths // 2, **options)
    steps = 4000 // batch

    def share(micro_batch: int) -> float:
        p.micro_batch_tokens = micro_batch
        made = [p.step(step) for step in range(steps)]
        micro_batches = sum(
            len(micro_batches) for step in made for micro_batches in step.micro_batches
        )
        return sum(step.tokens for step in made) / (micro_batch * micro_batches)

    whole = share(2048)
    p.micro_batch_tokens = 2048
    micro_batch = uniform_micro_batch(p, steps)
    assert lengths.max() <= micro_batch <= 2048 and micro_batch == uniform_micro_batch(p, steps)
    assert share(micro_batch) > max(whole, least), whole


@given(st.integers(10, 60), st.integers(1, 8), st.sets(st.integers(0, 20), max_size=6))
def test_samples_of_skipped_steps_are_left_out_and_the_others_stay(n, batch, skipped):
    whole, short = plan(n, batch), plan(n, batch)
    short.leave_out([99])  # replaced by the next call
    short.leave_out(skipped)
    gone = {i for step in skipped for i in whole.step(step).samples}
    assert short.left_out.tolist() == sorted(gone)
    assert short.drawn(skipped).tolist() == sorted(gone), "left-out samples included"
    for step in range(25):
        made = short.step(step)
        assert list(made.samples) == [i for i in whole.step(step).samples if i not in gone]
        assert made.supervised == sum(short.supervised[i] for i in made.samples)
