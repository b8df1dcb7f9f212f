"""The files of a checkpoint in object storage: written while they are made, read by parts, checked.

A large file goes up in parts, several at a time, as its bytes come, from the memory they are in.
Each part has a checksum of its own, so a reader fetches the parts that it needs and believes none
of the others. What HEAD keeps of such a file is the checksum of its parts' checksums, as S3 does
for composite ones.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Final, TypeVar

from finetune_trainer.failures import TrainerError
from finetune_trainer.storage.objects import FileInfo, ObjectNotFound, ObjectStore
from finetune_trainer.storage.run_head import Checkpoint, CorruptCheckpoint

PART_BYTES: Final = 16 << 20
"""Of a part, at least. A writer and a reader hold some ``PARALLEL`` of them."""
MOST_PARTS: Final = 10_000
"""Of an object: S3's limit."""
PARALLEL: Final = 8
"""Parts on their way at a time."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class PartSums:
    """What a reader checks a file by that went up in parts."""

    size: int
    part_bytes: int
    """Of every part but the last."""
    sha256s: tuple[bytes, ...]
    """Of each part."""

    @property
    def info(self) -> FileInfo:
        """What HEAD keeps: the checksum is that of the parts' checksums, one after another."""
        return FileInfo(self.size, hashlib.sha256(b"".join(self.sha256s)).hexdigest())

    def parts(self, start: int, stop: int) -> range:
        """Numbers (from 0) of the parts that hold these bytes."""
        return range(start // self.part_bytes, -(-stop // self.part_bytes))


def write_file(store: ObjectStore, uri: str, data: bytes) -> FileInfo:
    """Write a small file; what HEAD keeps of it."""
    store.put(uri, data)
    return FileInfo(len(data), hashlib.sha256(data).hexdigest())


def stream_file(
    store: ObjectStore, uri: str, pieces: Iterable[bytes | memoryview], size: int
) -> PartSums:
    """Write a file from its bytes in order, as they come. Pieces that are larger than a part are
    sent from the memory they are in; of smaller ones, ``PARALLEL`` parts and one are held.

    Where this fails there is no object, and no parts are left behind; those of a process that died
    are removed with the next checkpoint of its run (``head``).

    Args:
        size: bytes that are about to come; it sets the size of the parts.
    """
    part_bytes = max(PART_BYTES, -(-size // MOST_PARTS))
    parts = _cut(pieces, part_bytes)
    first, second = next(parts, b""), next(parts, None)
    if second is None:
        store.put(uri, first)
        return PartSums(len(first), part_bytes, (hashlib.sha256(first).digest(),))
    upload = store.begin_parts(uri)

    def send(numbered: tuple[int, bytes | memoryview]) -> tuple[str, int, bytes]:
        number, data = numbered
        tag = store.put_part(uri, upload, number, data)
        return tag, len(data), hashlib.sha256(data).digest()

    try:
        sent = list(_in_parallel(send, enumerate(chain((first, second), parts), start=1)))
        total = sum(length for _, length, _ in sent)
        store.join_parts(uri, upload, [tag for tag, _, _ in sent], total)
    except BaseException:
        with suppress(TrainerError):
            store.drop_parts(uri, upload)
        raise
    return PartSums(total, part_bytes, tuple(digest for _, _, digest in sent))


def read_file(store: ObjectStore, checkpoint: Checkpoint, name: str) -> bytes:
    """A file that ``write_file`` wrote.

    Raises:
        CorruptCheckpoint: where it is missing, or is not what was committed.
    """
    expected = checkpoint.files.get(name)
    if expected is None:
        raise CorruptCheckpoint(checkpoint.uri, f"it has no {name}")
    try:
        data = store.get(f"{checkpoint.uri}/{name}")
    except ObjectNotFound:
        raise CorruptCheckpoint(checkpoint.uri, f"{name} is missing") from None
    got = FileInfo(len(data), hashlib.sha256(data).hexdigest())
    if got != expected:
        raise CorruptCheckpoint(
            checkpoint.uri,
            f"{name} has {got.bytes} bytes with sha256 {got.sha256}, but {expected.bytes} with"
            f" {expected.sha256} were committed",
        )
    return data


def read_parts(
    store: ObjectStore,
    checkpoint: Checkpoint,
    sums: Mapping[str, PartSums],
    wanted: Iterable[tuple[str, int]],
) -> Iterator[tuple[str, int, bytes]]:
    """Parts of files that ``stream_file`` wrote (name, number from 0), in that order; several are
    fetched at a time.

    Raises:
        CorruptCheckpoint: where one is missing, or is not what was committed.
    """

    for name, of in sums.items():
        if of.info != checkpoint.files.get(name):
            raise CorruptCheckpoint(checkpoint.uri, f"{name} is not the file that HEAD names")

    def fetch(part: tuple[str, int]) -> tuple[str, int, bytes]:
        name, number = part
        of = sums[name]
        start = number * of.part_bytes
        stop = min(start + of.part_bytes, of.size)
        try:
            data = store.get_range(f"{checkpoint.uri}/{name}", start, stop)
        except ObjectNotFound:
            raise CorruptCheckpoint(checkpoint.uri, f"{name} is missing") from None
        if hashlib.sha256(data).digest() != of.sha256s[number]:
            raise CorruptCheckpoint(
                checkpoint.uri, f"bytes {start} to {stop} of {name} are not what was committed"
            )
        return name, number, data

    return _in_parallel(fetch, wanted)


def _cut(pieces: Iterable[bytes | memoryview], size: int) -> Iterator[bytes | memoryview]:
    """The same bytes in parts of ``size``; the last is what remains. A part that lies within one
    piece is a view of it, and only what lies across pieces is copied."""
    across = bytearray()
    for piece in pieces:
        rest = memoryview(piece)
        if across:
            taken = size - len(across)
            across += rest[:taken]
            rest = rest[taken:]
            if len(across) < size:
                continue
            yield bytes(across)
            across.clear()
        while len(rest) >= size:
            yield rest[:size]
            rest = rest[size:]
        across += rest
    if across:
        yield bytes(across)


def _in_parallel(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Results in the order of the items, which are drawn no sooner than there is room."""
    under_way: deque[Future[R]] = deque()
    with ThreadPoolExecutor(PARALLEL) as pool:
        for item in items:
            under_way.append(pool.submit(work, item))
            if len(under_way) == PARALLEL:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
