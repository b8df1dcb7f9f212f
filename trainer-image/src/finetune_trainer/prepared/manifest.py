"""``manifest.json`` of prepared data: its files, sets and counts.

It is written last. A folder without it is incomplete and is written again.
"""

from __future__ import annotations

import json
from typing import Final

from pydantic import Field

from finetune_api.base import Record
from finetune_api.sources import Format
from finetune_trainer.prepared.split import Side
from finetune_trainer.storage.objects import ObjectNotFound, ObjectStore

_ANSWER_TOKENS: Final = 512
"""Maximum tokens of a generated answer, unless the spec gives another."""
FORMAT_VERSION = 9
"""Incremented when prepare writes different output for the same data; part of the digest."""


class DataFile(Record):
    """One file of the prepared data."""

    name: str
    """Address below the data's prefix."""
    bytes: int
    """Size in bytes."""
    sha256: str
    """sha256 of its content, hexadecimal."""


class DataSet(Record):
    """The samples of one source on one side of the split."""

    split: Side
    """Side of the split."""
    name: str
    """Name in metrics; unique on its side."""
    format: Format
    """Format of its records."""
    built_in: bool = False
    """Whether it is the set of verifiable instructions (``sources.BUILT_IN``)."""
    samples: int
    """Number of samples, at least one."""
    tokens: int
    """Number of tokens."""
    supervised: int
    """Number of supervised tokens."""
    labels: dict[str, list[int]] = Field(default={})
    """Labels of a set of format Classification, sorted: those of its samples and of all sets of its
    name. Each has its tokens behind a prompt as training has them, with the end token. Empty for
    more than MOST_LABELS, for a classification head, and in data of earlier releases."""


class DataManifest(Record):
    """The manifest."""

    version: int
    """FORMAT_VERSION of the writer."""
    digest: str
    """Content digest."""
    sets: list[DataSet]
    """Sets; the index column ``set`` is a position in this list."""
    shards: dict[Side, list[str]]
    """Shard files by side; the index column ``shard`` is a position in the side's list."""
    max_length: int
    """Maximum tokens of a sample."""
    max_completion_tokens: int
    """Tokens of the longest last answer of a training sample, with the end token; without training
    samples, of any sample."""
    stop_token_ids: list[int]
    """Last tokens of the supervised answers: generation stops at each of them."""
    classes: list[str]
    """Names of the classes by number; empty where the task has no classes."""
    dropped: dict[str, int]
    """Number of records dropped, by cause."""
    files: list[DataFile]
    """Shards, indexes and reports."""

    def samples(self, split: Side) -> int:
        """Number of samples of a side."""
        return sum(s.samples for s in self.sets if s.split == split)

    def answer_tokens(self, wanted: int | None) -> int:
        """Maximum tokens of a generated answer: ``evaluation.maxNewTokens``, or its default."""
        return wanted or min(self.max_completion_tokens + 1, _ANSWER_TOKENS)

    def file(self, name: str) -> DataFile:
        """Return the entry of a file.

        Raises:
            KeyError: the manifest has no such file.
        """
        for entry in self.files:
            if entry.name == name:
                return entry
        raise KeyError(name)


def read_manifest(store: ObjectStore, data_uri: str) -> DataManifest | None:
    """Return the manifest of prepared data; None where the data is incomplete."""
    try:
        text = store.get(f"{data_uri}/manifest.json")
    except ObjectNotFound:
        return None
    return DataManifest.model_validate_json(text)


def write_manifest(store: ObjectStore, data_uri: str, manifest: DataManifest) -> None:
    text = json.dumps(manifest.to_json(), ensure_ascii=False, indent=1) + "\n"
    store.put(f"{data_uri}/manifest.json", text.encode())


def is_complete(store: ObjectStore, data_uri: str, manifest: DataManifest) -> bool:
    """Whether every file of the manifest exists with its size. Readers check the contents."""
    there = {info.uri: info.size for info in store.list(f"{data_uri}/")}
    return all(there.get(f"{data_uri}/{f.name}") == f.bytes for f in manifest.files)
