"""The files of a checkpoint in object storage: streamed upload, reads by part, checksums.

A large file is uploaded in parts, several in parallel, as its bytes are produced and without a
copy. Each part has its own checksum, so a reader fetches and verifies only the parts that it needs.
HEAD stores the checksum of the parts' checksums, like S3's composite checksums.
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
from finetune_trainer.storage.local_copies import LocalCopies
from finetune_trainer.storage.objects import FileInfo, ObjectNotFound, ObjectStore
from finetune_trainer.storage.run_head import Checkpoint, CorruptCheckpoint

PART_BYTES: Final = 16 << 20
"""Least size of a part. Writers and readers hold about ``PARALLEL`` parts in memory."""
MOST_PARTS: Final = 10_000
"""S3's limit of parts per object."""
PARALLEL: Final = 8
"""Parts transferred in parallel."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class PartSums:
    """Part checksums of a file that was uploaded in parts."""

    size: int
    part_bytes: int
    """Size of every part but the last."""
    sha256s: tuple[bytes, ...]
    """sha256 of each part."""

    @property
    def info(self) -> FileInfo:
        """Entry of HEAD: the size, and the sha256 of the concatenated part checksums."""
        return FileInfo(self.size, hashlib.sha256(b"".join(self.sha256s)).hexdigest())

    def parts(self, start: int, stop: int) -> range:
        """Return the numbers (from 0) of the parts that hold these bytes."""
        return range(start // self.part_bytes, -(-stop // self.part_bytes))


def write_file(store: ObjectStore, uri: str, data: bytes) -> FileInfo:
    """Write a small file; return its entry for HEAD."""
    store.put(uri, data)
    return FileInfo(len(data), hashlib.sha256(data).hexdigest())


def stream_file(
    store: ObjectStore, uri: str, pieces: Iterable[bytes | memoryview], size: int
) -> PartSums:
    """Upload a file while its bytes are produced, in order. Pieces larger than a part are sent
    without a copy; smaller pieces are joined, and at most ``PARALLEL`` + 1 parts are held.

    A failure leaves no object and no parts; the parts of a process that died are removed with the
    next checkpoint of the run (``claim``).

    Args:
        size: total bytes; sets the size of the parts.
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


def read_file(
    store: ObjectStore, checkpoint: Checkpoint, name: str, copies: LocalCopies | None = None
) -> bytes:
    """Return a file that ``write_file`` wrote, from this node's copies if they have it.

    Raises:
        CorruptCheckpoint: the file is missing or differs from the committed one.
    """
    expected = checkpoint.files.get(name)
    if expected is None:
        raise CorruptCheckpoint(checkpoint.uri, f"it has no {name}")
    if copies is not None:
        sha256 = bytes.fromhex(expected.sha256)
        if (copy := copies.get(checkpoint.uri, name, 0, expected.bytes, sha256)) is not None:
            return copy
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
    copies: LocalCopies | None = None,
) -> Iterator[tuple[str, int, bytes]]:
    """Yield the wanted parts (name, number from 0) of files that ``stream_file`` wrote, in order,
    from this node's copies if they have them; several are fetched in parallel.

    Raises:
        CorruptCheckpoint: a part is missing or differs from the committed one.
    """

    for name, of in sums.items():
        if of.info != checkpoint.files.get(name):
            raise CorruptCheckpoint(checkpoint.uri, f"{name} is not the file that HEAD names")

    def fetch(part: tuple[str, int]) -> tuple[str, int, bytes]:
        name, number = part
        of = sums[name]
        start = number * of.part_bytes
        stop = min(start + of.part_bytes, of.size)
        if copies is not None:
            copy = copies.get(checkpoint.uri, name, start, stop, of.sha256s[number])
            if copy is not None:
                return name, number, copy
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
    """Yield the same bytes in parts of ``size``, the last one shorter. A part within one piece is a
    view of the piece; only parts that span pieces are copied."""
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
    """Yield results in the order of the items, with at most ``PARALLEL`` items in progress."""
    under_way: deque[Future[R]] = deque()
    with ThreadPoolExecutor(PARALLEL) as pool:
        for item in items:
            under_way.append(pool.submit(work, item))
            if len(under_way) == PARALLEL:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
