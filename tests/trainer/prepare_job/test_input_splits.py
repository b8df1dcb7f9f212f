"""Input splits: the lines of byte ranges, and the assignment of splits to pods."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.prepare.reading.inputsplits import ByteRange, InputSplit, deal
from finetune_trainer.prepare.reading.lines import count_lines, lines_between
from finetune_trainer.prepare.reading.sources import DataObject


@given(st.lists(st.sampled_from([b"", b"a", b"abc", b"\xef\xbb\xbf"]), max_size=12), st.booleans(),
       st.lists(st.integers(0, 60), max_size=4))  # fmt: skip
def test_adjacent_byte_ranges_yield_every_line_once(
    body: list[bytes], ended: bool, cuts: list[int]
) -> None:
    data = b"\n".join(body) + (b"\n" if ended else b"")
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    found: list[bytes] = []
    for start, end in itertools.pairwise(edges):
        part = list(lines_between(io.BytesIO(data), start, end))
        assert count_lines(io.BytesIO(data), start, end) == len(part)
        found += part
    expected = data.splitlines(keepends=True) if data else []
    if expected:
        expected[0] = expected[0].removeprefix(b"\xef\xbb\xbf")
    assert found == expected


def split_of(number: int, size: int) -> InputSplit:
    return InputSplit(number, 0, (ByteRange(DataObject("s3://b/x", size, "", Path()), 0, size),))


@given(st.lists(st.integers(0, 2000), max_size=40), st.integers(1, 8))
def test_each_split_is_assigned_to_one_pod_and_the_bytes_are_balanced(
    sizes: list[int], pods: int
) -> None:
    hands = deal([split_of(i, size) for i, size in enumerate(sizes)], pods)
    assert len(hands) == pods
    assert sorted(p.number for hand in hands for p in hand) == list(range(len(sizes)))
    assert all(hand == sorted(hand, key=lambda p: p.number) for hand in hands)
    loads = [sum(p.bytes for p in hand) for hand in hands]
    assert max(loads) - min(loads) <= max(sizes, default=0)


def test_splits_of_equal_size_alternate_between_pods() -> None:
    hands = deal([split_of(i, 64) for i in range(7)], 3)
    assert [[p.number for p in hand] for hand in hands] == [[0, 3, 6], [1, 4], [2, 5]]
