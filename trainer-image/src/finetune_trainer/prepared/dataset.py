"""Reads prepared data: samples by position, from memory-mapped shards.

A shard is an Arrow IPC file of one record batch. Reading a sample takes two offset look-ups and a
slice, without a copy. Shards are downloaded on first use, those of a batch in parallel, checked
against the manifest, and shared by the processes of a pod.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from finetune_trainer.failures import DataError
from finetune_trainer.prepared.fetches import Fetches
from finetune_trainer.prepared.manifest import DataManifest, read_manifest
from finetune_trainer.prepared.slices import SLICES, read_slices
from finetune_trainer.prepared.split import Side
from finetune_trainer.storage.objects import ObjectStore, file_info

_SAMPLE: Final = (
    ("input_ids", pa.list_(pa.int32())),
    ("spans", pa.list_(pa.int32())),
    ("prompt_length", pa.int32()),
    ("label", pa.string()),
)
TOKEN_SCHEMA: Final = pa.schema([*_SAMPLE, ("where", pa.string())])
"""Columns of a training shard. ``spans`` holds start, end, start, end … of the supervised spans.
``prompt_length`` is the number of tokens before the last span. ``label`` is set for
Classification. ``where`` is object and line of the record; earlier releases wrote none."""

REFERENCE_SCHEMA: Final = pa.schema(
    [*_SAMPLE, ("prompt", pa.string()), ("completion", pa.string())]
)
"""Columns of validation and test shards, with the text of the prompt and the reference answer."""

INDEX_SCHEMA: Final = pa.schema(
    [
        ("set", pa.uint16()),
        ("length", pa.int32()),
        ("supervised", pa.int32()),
        ("shard", pa.uint32()),
        ("row", pa.uint32()),
    ]
)
"""Columns of an index; its rows are in the order of the records."""

HELD_OUT_INDEX_SCHEMA: Final = pa.schema([*INDEX_SCHEMA, ("group", pa.uint32())])
"""Columns of the index of a held-out side. Samples of equal ``group`` are not independent: their
records have equal values of ``data.split.groupBy`` or, without it, equal prompts, or they are turns
or parts of one record."""


@dataclass(frozen=True)
class Index:
    """The index of a split, as columns of shape [samples]."""

    set: npt.NDArray[np.uint16]
    """Index of the sample's set in the manifest."""
    length: npt.NDArray[np.int32]
    """Number of tokens."""
    supervised: npt.NDArray[np.int32]
    """Number of supervised tokens (never the first token of a sample)."""
    shard: npt.NDArray[np.uint32]
    """Index of its shard in the manifest's list of the split."""
    row: npt.NDArray[np.uint32]
    """Row in the shard."""
    group: npt.NDArray[np.uint32] | None = None
    """Number of the sample's group; None for training samples."""

    @property
    def groups(self) -> npt.NDArray[np.uint32]:
        """Number of the group of each sample of a held-out side."""
        assert self.group is not None, "training samples have no groups"
        return self.group

    def __len__(self) -> int:
        return len(self.length)


@dataclass(frozen=True)
class TokenSample:
    """One sample."""

    ids: npt.NDArray[np.int32]
    """Token ids, shape [tokens]; read-only."""
    supervised: npt.NDArray[np.bool_]
    """Mask of the supervised tokens, shape [tokens]."""
    label: int = -1
    """Number of its class; -1 where the task has no classes."""


@dataclass(frozen=True)
class Reference:
    """A prompt and its reference answer."""

    prompt_ids: npt.NDArray[np.int32]
    """Tokens before the (last) answer, exactly as in training, shape [tokens]."""
    prompt: str
    """The prompt's text, uncut."""
    completion: str
    """The reference answer, uncut."""
    label: str | None
    """The reference label, for Classification."""


@dataclass(frozen=True)
class AnsweredPrompt:
    """A sample as an example of a prompt and its answer."""

    ids: npt.NDArray[np.int32]
    """Token ids, with the answer, shape [tokens]; read-only."""
    prompt_length: int
    """Tokens before the (last) answer."""
    label: str | None
    """Its label, for Classification."""


@dataclass(frozen=True)
class _Shard:
    """A memory-mapped shard; arrays are views of the file."""

    batch: Any
    ids: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int32]
    spans: npt.NDArray[np.int32]
    span_starts: npt.NDArray[np.int32]
    prompt_length: npt.NDArray[np.int32]

    def ids_of(self, row: int) -> npt.NDArray[np.int32]:
        return self.ids[self.starts[row] : self.starts[row + 1]]

    def sample(self, row: int, classes: Mapping[str, int]) -> TokenSample:
        ids = self.ids_of(row)
        supervised = np.zeros(len(ids), np.bool_)
        spans = self.spans[self.span_starts[row] : self.span_starts[row + 1]]
        for start, end in spans.reshape(-1, 2).tolist():
            supervised[start:end] = True
        label = classes[self.batch.column("label")[row].as_py()] if classes else -1
        return TokenSample(ids, supervised, label)

    def reference(self, row: int) -> Reference:
        text = {name: self.batch.column(name)[row].as_py() for name in _TEXTS}
        return Reference(self.ids_of(row)[: self.prompt_length[row]], **text)

    def answered(self, row: int) -> AnsweredPrompt:
        label = self.batch.column("label")[row].as_py()
        return AnsweredPrompt(self.ids_of(row), int(self.prompt_length[row]), label)

    def place(self, row: int) -> str | None:
        known = "where" in self.batch.schema.names
        return self.batch.column("where")[row].as_py() if known else None


_TEXTS: Final = ("prompt", "completion", "label")


class PreparedData:
    """The prepared data of a run, created by ``open``. Thread-safe.

    Raises (every method that reads):
        DataError: 'PreparedDataDamaged', a file differs from the manifest.
    """

    def __init__(self, store: ObjectStore, uri: str, cache: Path, manifest: DataManifest) -> None:
        self.manifest = manifest
        self._store = store
        self._uri = uri
        self._cache = cache
        self._indexes: dict[Side, Index] = {}
        self._shards = Fetches(lambda name: _map_shard(self._fetch(name)))
        self._classes = {name: number for number, name in enumerate(manifest.classes)}

    @classmethod
    def open(cls, store: ObjectStore, uri: str, cache: Path) -> PreparedData:
        """Open the prepared data at ``uri``; ``cache`` keeps downloaded files.

        Raises:
            DataError: 'PreparedDataMissing', the data has no manifest.
        """
        manifest = read_manifest(store, uri)
        if manifest is None:
            raise DataError(
                "PreparedDataMissing",
                f"{uri}/manifest.json: the prepared data does not exist any more; set a new"
                " spec.rerunToken to prepare it again",
            )
        return cls(store, uri, cache, manifest)

    def set_names(self, split: Side) -> list[tuple[int, str]]:
        """Number (value of the index column ``set``) and name of every set of a split."""
        return [(i, s.name) for i, s in enumerate(self.manifest.sets) if s.split == split]

    def index(self, split: Side) -> Index:
        """The index of a split."""
        if split not in self._indexes:
            table = pa.ipc.open_file(pa.memory_map(str(self._fetch(index_name(split))))).read_all()
            names = index_schema(split).names
            columns = {name: table[name].to_numpy() for name in names}
            self._indexes[split] = Index(**columns)
        return self._indexes[split]

    def slices(self) -> dict[str, list[str]]:
        """Value of every test sample, by field of ``evaluation.slices``, in the order of the test
        index. Data that was prepared without these fields has none."""
        return read_slices(self._fetch(SLICES))

    def samples(self, split: Side, positions: Sequence[int]) -> list[TokenSample]:
        """Return the samples at positions of the split's index."""
        return [shard.sample(row, self._classes) for shard, row in self._rows(split, positions)]

    def answered_prompts(self, split: Side, positions: Sequence[int]) -> list[AnsweredPrompt]:
        """Return the samples at positions of the split's index, as examples."""
        return [shard.answered(row) for shard, row in self._rows(split, positions)]

    def places(self, positions: Sequence[int]) -> list[str | None]:
        """Return object and line of the records of training samples: ``s3://bucket/key, line 3``;
        None: data of an earlier release."""
        return [shard.place(row) for shard, row in self._rows("train", positions)]

    def references(self, split: Side, positions: Sequence[int]) -> list[Reference]:
        """Return prompts and reference answers at positions of a held-out split's index. Training
        shards have no text."""
        return [shard.reference(row) for shard, row in self._rows(split, positions)]

    def expect(self, split: Side, positions: Sequence[int]) -> list[Future[_Shard]]:
        """Start to download the shards of samples that will be read; do not wait."""
        index, names = self.index(split), self.manifest.shards[split]
        return [self._shards.ask(names[index.shard[p]]) for p in positions]

    def _rows(self, split: Side, positions: Sequence[int]) -> list[tuple[_Shard, int]]:
        shards, row = self.expect(split, positions), self.index(split).row
        return [(s.result(), int(row[p])) for s, p in zip(shards, positions, strict=True)]

    def _fetch(self, name: str) -> Path:
        """Return the cached file; the first process of the pod that needs it downloads it."""
        entry = self.manifest.file(name)
        path = self._cache / self.manifest.digest / name
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                return path
            fresh = path.with_suffix(".part")
            self._store.download(f"{self._uri}/{name}", fresh)
            found = file_info(fresh)
            if (found.bytes, found.sha256) != (entry.bytes, entry.sha256):
                raise DataError(
                    "PreparedDataDamaged",
                    f"{self._uri}/{name}: {found.bytes} bytes with sha256 {found.sha256}, but the"
                    f" manifest says {entry.bytes} and {entry.sha256}; delete {self._uri}/ and set"
                    " a new spec.rerunToken to prepare the data again",
                )
            fresh.rename(path)
        return path


def index_schema(split: Side) -> Any:
    """Return the columns of a split's index."""
    return INDEX_SCHEMA if split == "train" else HELD_OUT_INDEX_SCHEMA


def index_name(split: Side) -> str:
    """Return the file name of a split's index."""
    return f"index-{split}.arrow"


def shard_name(split: Side, name: str, part: int, number: int) -> str:
    """Return the file name of a shard: its input split (``part``) and its number there."""
    return f"shards/{split}-{name}-{part:05d}-{number:02d}.arrow"


def shard_ids(path: Path) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Return the tokens of all samples of a shard file, shape [tokens], and the start of each with
    the end of the last, shape [samples + 1]; both are views of the file."""
    shard = _map_shard(path)
    return shard.ids, shard.starts


PIECE_TOKENS: Final = 1 << 18
"""Tokens per piece: bounds the memory of computations, which is several times the tokens' size."""


def pieces_of(
    ids: npt.NDArray[np.int32], starts: npt.NDArray[np.int32]
) -> Iterator[tuple[int, npt.NDArray[np.int32], npt.NDArray[np.int32]]]:
    """Yield the samples of a shard in pieces of about ``PIECE_TOKENS``: number of the first sample,
    all tokens of the shard, and the starts of the samples with the end of the last."""
    edges = np.searchsorted(starts, np.arange(0, starts[-1], PIECE_TOKENS)).tolist()
    for a, b in pairwise(dict.fromkeys([*edges, len(starts) - 1])):
        yield a, ids, starts[a : b + 1]


def _map_shard(path: Path) -> _Shard:
    batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    ids, spans = batch.column("input_ids"), batch.column("spans")
    return _Shard(
        batch=batch,
        ids=ids.values.to_numpy(),
        starts=ids.offsets.to_numpy(),
        spans=spans.values.to_numpy(),
        span_starts=spans.offsets.to_numpy(),
        prompt_length=batch.column("prompt_length").to_numpy(),
    )
