"""Cuts the objects into input splits and assigns the splits to pods.

An input split is a part of one source: several small objects, one object, or the lines of a large
object that begin in a byte range. The cuts depend on the data alone, and each input split is
written to its own files, so prepared data is the same bytes for any number of pods and processes.
Held-out sources are first: training records are compared with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Final

from finetune_trainer.prepare.reading.lines import count_lines, is_plain
from finetune_trainer.prepare.reading.sources import DataObject, Source

SPLIT_BYTES: Final = 64 << 20
"""Maximum bytes of a divisible input split: a restart repeats at most one split per pod."""


@dataclass(frozen=True)
class ByteRange:
    """The records of an object that begin in a range of its bytes."""

    item: DataObject
    start: int
    end: int

    @property
    def whole(self) -> bool:
        return (self.start, self.end) == (0, self.item.size)


@dataclass(frozen=True)
class InputSplit:
    """The unit of mapping and of repetition after a restart."""

    number: int
    """In the order of the data: held-out sources first."""
    source: int
    """Index of its source in the run's list."""
    ranges: tuple[ByteRange, ...]

    @property
    def bytes(self) -> int:
        return sum(part.end - part.start for part in self.ranges)


def divide(sources: Sequence[Source]) -> list[InputSplit]:
    """Return all input splits of the sources, in the order of the data."""
    splits: list[InputSplit] = []
    held_out_first = sorted(range(len(sources)), key=lambda i: sources[i].side == "train")
    for number in held_out_first:
        pieces = (piece for item in sources[number].objects for piece in _cut(item))
        for ranges in _grouped(pieces):
            splits.append(InputSplit(len(splits), number, ranges))
    return splits


def deal(splits: Sequence[InputSplit], pods: int) -> list[list[InputSplit]]:
    """Return the input splits of each pod, in the order of the data. The largest are assigned
    first, each to the pod with the fewest bytes. Splits of equal size alternate between pods: pods
    advance through the data in parallel, so all splits before a fault are mapped soon."""
    loads = [0] * pods
    hands: list[list[InputSplit]] = [[] for _ in range(pods)]
    for split in sorted(splits, key=lambda split: (-split.bytes, split.number)):
        least = min(range(pods), key=lambda pod: (loads[pod], pod))
        loads[least] += split.bytes
        hands[least].append(split)
    return [sorted(hand, key=lambda split: split.number) for hand in hands]


class LineCounter:
    """Counts the lines of an object before a position: messages name the line of the whole object.

    Counting continues from the last position, so a pod reads an object of a source at most once
    for it. This is a hundred times as fast as making samples.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, int]] = {}

    def before(self, piece: ByteRange, stream: BinaryIO) -> int:
        """Number of lines that begin before the range. Moves the stream."""
        position, lines = self._known.get(piece.item.uri, (0, 0))
        if position > piece.start:  # an earlier source has the same object
            position, lines = 0, 0
        lines += count_lines(stream, position, piece.start)
        self._known[piece.item.uri] = (piece.start, lines)
        return lines

    def counted(self, piece: ByteRange, lines: Iterator[bytes]) -> Iterator[bytes]:
        """Yield the lines of a range and count them."""
        _, count = self._known.get(piece.item.uri, (0, 0))
        for line in lines:
            yield line
            count += 1
        self._known[piece.item.uri] = (piece.end, count)


def _cut(item: DataObject) -> Iterator[ByteRange]:
    step = SPLIT_BYTES if is_plain(item.uri) else max(1, item.size)
    for start in range(0, item.size, step) if item.size else (0,):
        yield ByteRange(item, start, min(item.size, start + step))


def _grouped(pieces: Iterator[ByteRange]) -> Iterator[tuple[ByteRange, ...]]:
    group: list[ByteRange] = []
    size = 0
    for piece in pieces:
        if group and size + piece.end - piece.start > SPLIT_BYTES:
            yield tuple(group)
            group, size = [], 0
        group.append(piece)
        size += piece.end - piece.start
    if group:
        yield tuple(group)
