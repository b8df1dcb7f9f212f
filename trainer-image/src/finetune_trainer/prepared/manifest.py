"""``manifest.json`` of prepared data: what is there, how large it is, and what was found.

It is written last. A folder without it is unfinished work and is written again.
"""

from __future__ import annotations

import json

from finetune_api.base import Record
from finetune_api.sources import Format
from finetune_trainer.prepared.split import Side
from finetune_trainer.storage.objects import ObjectNotFound, ObjectStore

FORMAT_VERSION = 7
"""Raised with every change of what prepare writes for the same data; part of the digest."""


class DataFile(Record):
    """One file of the prepared data."""

    name: str
    """Address below the data's prefix."""
    bytes: int
    """Size."""
    sha256: str
    """Of its bytes, hexadecimal."""


class DataSet(Record):
    """The samples of one source on one side of the split."""

    split: Side
    """Side of the split."""
    name: str
    """Name in metrics; unique on its side."""
    format: Format
    """What its records hold."""
    samples: int
    """Samples, at least one."""
    tokens: int
    """Tokens of them."""
    supervised: int
    """Tokens of them that are learned."""


class DataManifest(Record):
    """What was prepared."""

    version: int
    """FORMAT_VERSION of the writer."""
    digest: str
    """Content digest."""
    sets: list[DataSet]
    """Sets by number: the index' column ``set`` is a position in this list."""
    shards: dict[Side, list[str]]
    """Shard files by side; the index' column ``shard`` is a position in its side's list."""
    max_length: int
    """Most tokens that a sample may have."""
    max_completion_tokens: int
    """Longest last answer of a training sample, end token included."""
    stop_token_ids: list[int]
    """Tokens with which learned answers end: generation stops at each of them."""
    classes: list[str]
    """Names of the classes by their number; none where the task has no classes."""
    dropped: dict[str, int]
    """Records left out, by cause."""
    files: list[DataFile]
    """Shards, indexes and reports."""

    def samples(self, split: Side) -> int:
        """Samples on a side."""
        return sum(s.samples for s in self.sets if s.split == split)

    def file(self, name: str) -> DataFile:
        """The entry of a file.

        Raises:
            KeyError: where there is none.
        """
        for entry in self.files:
            if entry.name == name:
                return entry
        raise KeyError(name)


def read_manifest(store: ObjectStore, data_uri: str) -> DataManifest | None:
    """The manifest of prepared data, or None where the data is not complete."""
    try:
        text = store.get(f"{data_uri}/manifest.json")
    except ObjectNotFound:
        return None
    return DataManifest.model_validate_json(text)


def write_manifest(store: ObjectStore, data_uri: str, manifest: DataManifest) -> None:
    text = json.dumps(manifest.to_json(), ensure_ascii=False, indent=1) + "\n"
    store.put(f"{data_uri}/manifest.json", text.encode())


def is_complete(store: ObjectStore, data_uri: str, manifest: DataManifest) -> bool:
    """Whether every file of the manifest is there in its size (contents are checked by whoever
    reads them)."""
    there = {info.uri: info.size for info in store.list(f"{data_uri}/")}
    return all(there.get(f"{data_uri}/{f.name}") == f.bytes for f in manifest.files)
