"""Writes prepared data of given samples in the format of prepare, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from finetune_trainer.prepare.mapping.batch import shard_rows
from finetune_trainer.prepare.mapping.writer import ShardWriter
from finetune_trainer.prepare.rendering.examples import RenderedExample, Segment
from finetune_trainer.prepare.tokenizing.tokens import TokenizedSample
from finetune_trainer.prepared.dataset import INDEX_SCHEMA, TokenSample, index_name
from finetune_trainer.prepared.manifest import (
    FORMAT_VERSION,
    DataFile,
    DataManifest,
    DataSet,
    write_manifest,
)
from finetune_trainer.storage.objects import ObjectStore

Ids = npt.NDArray[np.int32]
Learned = tuple[tuple[int, int], ...]

_DRAFT = RenderedExample(
    where="made up", segments=(Segment("a", True),), prompt="", completion="a", label=None,
    group="a", framed=True, side="train", own="a",
)  # fmt: skip


def supervised_of(sample: TokenSample) -> tuple[Ids, Learned]:
    """Convert a sample to the input of ``write_prepared``."""
    edges = np.flatnonzero(np.diff(np.pad(sample.supervised, 1).astype(np.int8))).reshape(-1, 2)
    return sample.ids, tuple((int(start), int(end)) for start, end in edges)


def write_prepared(
    store: ObjectStore,
    uri: str,
    scratch: Path,
    samples: Iterable[tuple[Ids, Learned]],
    samples_a_shard: int | None = None,
) -> DataManifest:
    """Write samples as one training set.

    Args:
        samples: tokens and supervised spans of each.
        samples_a_shard: samples per shard. None: shards of the usual size.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(store, uri, scratch, "train", "set", 0)
    rows: list[tuple[int, int, int, int, int]] = []
    for ids, spans in samples:
        sample = TokenizedSample(_DRAFT, ids, spans, spans[-1][0])
        row = rows[-1][4] + 1 if rows and rows[-1][3] == len(writer.files) else 0
        rows.append((0, len(ids), sample.supervised, len(writer.files), row))
        writer.add(shard_rows([sample], "train"))
        if samples_a_shard is not None and row + 1 == samples_a_shard:
            writer.flush()
    writer.flush()
    files = [DataFile(name=f.name, bytes=f.bytes, sha256=f.sha256) for f in writer.files]
    columns = np.array(rows, np.int64).T
    arrays = [
        pa.array(c.astype(f.type.to_pandas_dtype()))
        for c, f in zip(columns, INDEX_SCHEMA, strict=True)
    ]
    path = scratch / "index.arrow"
    with pa.ipc.new_file(str(path), INDEX_SCHEMA) as file:
        file.write_batch(pa.record_batch(arrays, schema=INDEX_SCHEMA))
    info = store.upload(path, f"{uri}/{index_name('train')}")
    index = DataFile(name=index_name("train"), bytes=info.bytes, sha256=info.sha256)
    manifest = DataManifest(
        version=FORMAT_VERSION,
        digest="made",
        sets=[DataSet(split="train", name="set", format="Text", samples=len(rows),
                      tokens=int(columns[1].sum()), supervised=int(columns[2].sum()))],
        shards={"train": [f.name for f in files], "validation": [], "test": []},
        max_length=int(columns[1].max()), max_completion_tokens=1, stop_token_ids=[0], classes=[],
        dropped={}, files=[*files, index],
    )  # fmt: skip
    write_manifest(store, uri, manifest)
    return manifest
