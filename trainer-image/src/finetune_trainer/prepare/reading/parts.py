"""How the objects are cut into parts, and which worker reads which of them.

A part is some of one source: a few small objects, one object, or the lines of a large one that
begin in a range of its bytes. Where the cuts fall depends on the data alone, and each part is
written to files of its own, so that prepared data is the same bytes at any number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Final

from finetune_trainer.prepare.reading.lines import count_lines, is_plain
from finetune_trainer.prepare.reading.sources import DataObject, Source

PART_BYTES: Final = 64 << 20
"""Most bytes of a part that can be cut; half a minute of work for a core."""


@dataclass(frozen=True)
class Piece:
    """The records of an object that begin in a range of its bytes."""

    item: DataObject
    start: int
    end: int

    @property
    def whole(self) -> bool:
        return (self.start, self.end) == (0, self.item.size)


@dataclass(frozen=True)
class Part:
    """What is read in one go."""

    number: int
    """In the order of the data."""
    source: int
    """Position of its source in the run's list."""
    pieces: tuple[Piece, ...]

    @property
    def bytes(self) -> int:
        return sum(piece.end - piece.start for piece in self.pieces)


def divide(sources: Sequence[Source]) -> list[Part]:
    """All parts of the sources, in the order of the data."""
    parts: list[Part] = []
    for number, source in enumerate(sources):
        for pieces in _grouped(piece for item in source.objects for piece in _cut(item)):
            parts.append(Part(len(parts), number, pieces))
    return parts


def deal(parts: Sequence[Part], workers: int) -> list[list[Part]]:
    """The parts of each worker, in the order of the data: the largest are dealt first, each to the
    worker that has least; equal ones in turn, so that all workers go through the data side by
    side and the first fault is soon known to be the first."""
    loads = [0] * workers
    hands: list[list[Part]] = [[] for _ in range(workers)]
    for part in sorted(parts, key=lambda part: (-part.bytes, part.number)):
        least = min(range(workers), key=lambda worker: (loads[worker], worker))
        loads[least] += part.bytes
        hands[least].append(part)
    return [sorted(hand, key=lambda part: part.number) for hand in hands]


class LineCounter:
    """Lines of an object before a position: every complaint names the line of the whole object.

    A worker counts on from where it has come to, so it reads an object of a source at most once for
    this, which is a hundred times as fast as making samples.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, int]] = {}

    def before(self, piece: Piece, stream: BinaryIO) -> int:
        """Lines that begin before the piece; the stream is left anywhere."""
        position, lines = self._known.get(piece.item.uri, (0, 0))
        if position > piece.start:  # the object of another source before
            position, lines = 0, 0
        lines += count_lines(stream, position, piece.start)
        self._known[piece.item.uri] = (piece.start, lines)
        return lines

    def counted(self, piece: Piece, lines: Iterator[bytes]) -> Iterator[bytes]:
        """The lines of a piece; they need not be counted again."""
        _, count = self._known.get(piece.item.uri, (0, 0))
        for line in lines:
            yield line
            count += 1
        self._known[piece.item.uri] = (piece.end, count)


def _cut(item: DataObject) -> Iterator[Piece]:
    step = PART_BYTES if is_plain(item.uri) else max(1, item.size)
    for start in range(0, item.size, step) if item.size else (0,):
        yield Piece(item, start, min(item.size, start + step))


def _grouped(pieces: Iterator[Piece]) -> Iterator[tuple[Piece, ...]]:
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        if group and size + piece.end - piece.start > PART_BYTES:
            yield tuple(group)
            group, size = [], 0
        group.append(piece)
        size += piece.end - piece.start
    if group:
        yield tuple(group)
