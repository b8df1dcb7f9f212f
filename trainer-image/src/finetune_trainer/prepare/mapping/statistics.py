"""Sample statistics: one row per sample, in the order of the data, with everything that decisions
over the whole data need.

Map writes the rows of an input split, its shards and, last, a ``SplitSummary``. The reduce reads
them in the order of the data. A row takes 50 to 70 bytes in storage, and 128 more with near
duplicate detection.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from finetune_api.base import Record
from finetune_api.sources import Format
from finetune_trainer.prepare.quality.duplicates import DIGEST_BYTES
from finetune_trainer.prepare.quality.nearduplicates import FINGERPRINT, Words
from finetune_trainer.prepare.tokenizing.tokens import CUTS, Cut, TokenizedSample
from finetune_trainer.prepared.manifest import DataFile
from finetune_trainer.prepared.split import SIDES, Side, group_hash

SCHEMA: Final = pa.schema(
    [
        ("side", pa.uint8()),
        ("length", pa.int32()),
        ("supervised", pa.int32()),
        ("completion", pa.int32()),
        ("stop", pa.int32()),
        ("cut", pa.uint8()),
        ("where", pa.string()),
        ("label", pa.string()),
        ("label_tokens", pa.string()),
        ("group", pa.uint64()),
        ("slices", pa.string()),
        ("personal", pa.string()),
        ("digest", pa.binary(DIGEST_BYTES)),
        ("fingerprint", pa.binary(8 * FINGERPRINT)),
        ("shared", pa.string()),
    ]
)
"""Columns of a row. ``side`` and ``cut`` are indices into SIDES and CUTS. ``completion`` is the
length of the last answer in tokens and ``stop`` its last token (-1: cut off, in another sample, or
no answer). ``label_tokens`` are the tokens of the label as JSON, with the end token; null without
a label, or where it is cut off. ``group`` is the hash of a held-out sample's group; null for
training samples. ``slices`` are the values of the fields of ``evaluation.slices`` as JSON, null but
of test samples. ``personal`` counts the kinds of personal data, as JSON. ``digest`` and
``fingerprint`` are null without duplicate detection. ``shared`` is the text that a sample shares
with a held-out sample; null where there is none, or where held-out samples are known only in the
reduce."""


class Fault(Record):
    """A record that cannot be used."""

    reason: str
    """CamelCase word."""
    message: str
    """The fault and its position."""


class Preview(Record):
    """A sample offered to the report."""

    sample: int
    """Its row in the statistics."""
    shown: dict[str, Any]
    """As in ``report.json``, see ``previews.preview``."""


class ShardFile(DataFile):
    """A shard of an input split."""

    samples: int
    """Number of rows."""


class SplitSummary(Record):
    """Summary of an input split. It is written last, and marks the split as done."""

    format: Format | None = None
    """Format of its source; None where no record shows it."""
    records: int = 0
    """Records read, including unusable ones."""
    training_examples: int = 0
    """Examples that duplicate detection covers."""
    overlength: int = 0
    """Samples dropped for their length."""
    split: int = 0
    """Documents that were split into several samples."""
    compared: int | None = None
    """Number of held-out samples that its samples were compared with; None: not compared yet."""
    reasons: dict[str, int]
    """Number of unusable records, by reason."""
    faults: list[Fault]
    """The first unusable records."""
    languages: dict[str, int]
    """Languages of some examples."""
    previews: dict[Side, list[Preview]]
    """Previews of the first samples of each side."""
    shards: dict[Side, list[ShardFile]]
    """Files of the samples."""


def statistics_of(
    samples: Sequence[TokenizedSample],
    cuts: Sequence[Cut],
    digests: Sequence[bytes] | None,
    fingerprints: Words | None,
    shared: Mapping[int, str],
) -> Any:
    """Return the rows of samples, as a record batch of ``SCHEMA``.

    Args:
        cuts: what was cut off each.
        digests, fingerprints: of each; None without duplicate detection.
        shared: text shared with a held-out sample, by row.
    """
    count = len(samples)
    columns: dict[str, Sequence[Any]] = {
        "side": [SIDES.index(s.example.side) for s in samples],
        "length": [len(s.ids) for s in samples],
        "supervised": [s.supervised for s in samples],
        "completion": [len(s.ids) - s.prompt_length for s in samples],
        "stop": [_stop(s, cut) for s, cut in zip(samples, cuts, strict=True)],
        "cut": [CUTS.index(cut) for cut in cuts],
        "where": _storable([s.example.where for s in samples]),
        "label": _storable([s.example.label for s in samples]),
        "label_tokens": [_label_tokens(s, cut) for s, cut in zip(samples, cuts, strict=True)],
        "group": [
            group_hash(s.example.group) if s.example.side != "train" else None for s in samples
        ],
        "slices": [json.dumps(s.example.slices) if s.example.slices else None for s in samples],
        "personal": [
            json.dumps(dict(s.example.personal)) if s.example.personal else None for s in samples
        ],
        "digest": digests or [None] * count,
        "fingerprint": (
            [None] * count if fingerprints is None else [row.tobytes() for row in fingerprints]
        ),
        "shared": _storable([shared.get(row) for row in range(count)]),
    }
    arrays = [pa.array(columns[field.name], field.type) for field in SCHEMA]
    return pa.record_batch(arrays, schema=SCHEMA)


def _stop(sample: TokenizedSample, cut: Cut) -> int:
    stops = sample.spans and cut != "Completion" and not sample.example.continues
    return int(sample.ids[-1]) if stops else -1


def _label_tokens(sample: TokenizedSample, cut: Cut) -> str | None:
    whole = sample.example.label is not None and sample.spans and cut != "Completion"
    return json.dumps(sample.ids[sample.prompt_length :].tolist()) if whole else None


def _storable(texts: Sequence[str | None]) -> list[str | None]:
    """Texts that Arrow can store: file names and records may hold lone surrogates."""
    return [t if t is None else t.encode(errors="replace").decode() for t in texts]


class SampleStatistics:
    """A batch of rows, by column."""

    def __init__(self, batch: Any, first: int) -> None:
        self._batch = batch
        self.first = first
        """Index of the first row in the split."""

    def __len__(self) -> int:
        return int(self._batch.num_rows)

    def numbers(self, name: str) -> npt.NDArray[Any]:
        """A column of numbers, shape [rows]."""
        found: npt.NDArray[Any] = self._batch.column(name).to_numpy()
        return found

    def texts(self, name: str, rows: npt.NDArray[np.int64]) -> list[str]:
        """Values of a text column at ``rows``, none of which is null."""
        found: list[str] = self._batch.column(name).take(pa.array(rows)).to_pylist()
        return found

    def groups(self, rows: npt.NDArray[np.int64]) -> list[int]:
        """Hashes of the groups of held-out samples at ``rows``."""
        found: list[int] = self._batch.column("group").take(pa.array(rows)).to_pylist()
        return found

    def having(self, name: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The given rows whose value is not null."""
        valid = self._batch.column(name).is_valid().to_numpy(zero_copy_only=False)
        found: npt.NDArray[np.int64] = rows[valid[rows]]
        return found

    def digests(self) -> list[bytes]:
        found: list[bytes] = self._batch.column("digest").to_pylist()
        return found

    def fingerprints(self) -> Words:
        """Shape [rows, FINGERPRINT]."""
        data = b"".join(self._batch.column("fingerprint").to_pylist())
        return np.frombuffer(data, np.uint64).reshape(-1, FINGERPRINT)


def read_statistics(path: Path) -> Iterator[SampleStatistics]:
    """Yield the rows of a file, batch by batch."""
    with pa.OSFile(str(path)) as source:
        file, first = pa.ipc.open_file(source), 0
        for i in range(file.num_record_batches):
            rows = SampleStatistics(file.get_batch(i), first)
            yield rows
            first += len(rows)
