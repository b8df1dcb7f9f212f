"""The mixture: token shares hold at every point; any part is computed without earlier parts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainer.engine.planning.mixture import Curriculum, Line, Mixture, Stage

seeds = st.integers(0, 2**31 - 1)
sizes = st.lists(st.integers(1, 40), min_size=1, max_size=4)
LONGEST = 50


def sources_of(counts: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return source and length of each sample, with the sources in random order."""
    draw = np.random.default_rng(seed)
    sources = np.repeat(np.arange(len(counts)), counts)
    return draw.permutation(sources), draw.integers(1, LONGEST, len(sources))


def lines_of(sources: np.ndarray, lengths: np.ndarray, count: int, seed: int) -> list[Line]:
    places = [np.flatnonzero(sources == i) for i in range(count)]
    return [Line(at, lengths[at], seed, i) for i, at in enumerate(places)]


def shares_of(counts: list[int], values: st.SearchStrategy[float]) -> st.SearchStrategy:
    return st.lists(values, min_size=len(counts), max_size=len(counts))


@given(st.integers(1, 60), seeds, st.integers(0, 200), st.integers(0, 200))
def test_counts_of_a_line_match_a_loop(n, seed, tokens, sample):
    draw = np.random.default_rng(seed)
    line = Line(np.arange(n), draw.integers(1, 9, n), seed, 0)
    positions, middles = line.slice(0, 5 * n)
    assert sorted(positions[:n]) == sorted(positions[n : 2 * n]) == list(range(n))
    tokens = tokens % (3 * line.tokens) + 0.5
    assert line.samples_before(tokens) == sum(middle < tokens for middle in middles)
    sample %= 3 * n
    part, part_middles = line.slice(sample, sample + n)
    assert (part == positions[sample : sample + n]).all()
    assert (part_middles == middles[sample : sample + n]).all()
    half = (part_middles[0] - line.tokens_before(sample)) * 2
    assert half == line.tokens_before(sample + 1) - line.tokens_before(sample)


@given(sizes, seeds)
def test_in_proportion_every_sample_occurs_once_per_round(counts, seed):
    sources, lengths = sources_of(counts, seed)
    lines = lines_of(sources, lengths, len(counts), seed)
    mixture = Mixture.in_proportion(lines, [0] * len(counts))
    for number in (0, 1, 7):
        first = number * len(sources)
        assert sorted(mixture.samples(first, first + len(sources))) == list(range(len(sources)))


@given(sizes, seeds, st.data())
def test_shares_of_the_tokens_hold_at_every_point(counts, seed, data):
    sources, lengths = sources_of(counts, seed)
    shares = data.draw(shares_of(counts, st.floats(0.05, 1)), "shares")
    first = data.draw(shares_of(counts, st.integers(0, 99)), "first")
    mixture = Mixture(lines_of(sources, lengths, len(counts), seed), shares, first)
    tokens = np.zeros(len(counts))
    for position in mixture.samples(0, 6 * len(sources)):
        tokens[sources[position]] += lengths[position]
        ideal = np.array(shares) / sum(shares) * tokens.sum()
        # Each source deviates by at most one of its samples, plus the deviations of the others.
        assert (np.abs(tokens - ideal) <= LONGEST * len(counts)).all()


@given(sizes, seeds, st.integers(0, 400), st.integers(0, 60), st.data())
def test_any_part_equals_that_part_of_the_whole_mixture(counts, seed, first, length, data):
    sources, lengths = sources_of(counts, seed)
    values = st.sampled_from([0.0, 0.1, 1.0, 7.0])
    shares = data.draw(shares_of(counts, values).filter(any), "shares")

    def mixture() -> Mixture:
        lines = lines_of(sources, lengths, len(counts), seed)
        return Mixture(lines, shares, [3] * len(counts))

    whole = mixture().samples(0, first + length)
    assert (mixture().samples(first, first + length) == whole[first:]).all()
    taken = np.bincount(sources[whole], minlength=len(counts))
    assert mixture().taken(first + length) == taken.tolist()
    assert all(share or not n for share, n in zip(shares, taken, strict=True))


@settings(max_examples=50)
@given(sizes, seeds, st.integers(1, 9), st.data())
def test_stages_continue_where_the_previous_stage_stopped(counts, seed, batch, data):
    sources, lengths = sources_of(counts, seed)
    weights = st.none() | shares_of(counts, st.floats(0.1, 1))
    stages = data.draw(st.lists(st.builds(Stage, st.integers(0, 12), weights), min_size=1))[:4]

    def curriculum() -> Curriculum:
        return Curriculum(sources, lengths, len(counts), stages, batch, seed)

    steps = sum(stage.steps for stage in stages)
    made = [curriculum().samples(step) for step in range(steps)]
    whole = curriculum()
    assert all((whole.samples(step) == part).all() for step, part in enumerate(made))
    trained = np.concatenate([np.empty(0, np.int64), *made])
    for number in range(len(counts)):
        own = trained[sources[trained] == number]
        line = Line(np.flatnonzero(sources == number), lengths[sources == number], seed, number)
        assert (own == line.slice(0, len(own))[0]).all(), "stages continue one line per source"


def test_stages_mix_by_their_shares():
    sources, lengths = np.repeat([0, 1], 50), np.full(100, 10)
    stages = [Stage(4, [1.0, 0.0]), Stage(4, [0.25, 0.75]), Stage(2)]
    made = Curriculum(sources, lengths, 2, stages, 8, 0)
    shares = [float(np.mean(sources[made.samples(step)] == 0)) for step in range(10)]
    assert shares == [1.0] * 4 + [0.25] * 4 + [0.5] * 2
    assert [made.stage_of(step) for step in range(10)] == [0] * 4 + [1] * 4 + [2] * 2


@pytest.mark.parametrize("seed", [0, 1])
def test_orders_differ_by_pass_and_by_source(seed):
    lengths = np.ones(200, np.int64)
    one, other = (Line(np.arange(200), lengths, seed, stream) for stream in (0, 1))
    passes = {tuple(line.slice(n * 200, n * 200 + 200)[0]) for line in (one, other) for n in (0, 1)}
    assert len(passes) == 4
