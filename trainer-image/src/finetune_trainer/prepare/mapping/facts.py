"""What is known of the samples of a part, a row each: all that verdicts over the whole data need.

A part's worker writes the rows (``FactsWriter``), its shards and, last, a ``PartSummary``; the
worker that gathers reads them in the order of the data. A row takes 50 to 70 bytes in storage, and
128 more where near duplicates are looked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from finetune_api.base import Record
from finetune_api.sources import Format
from finetune_trainer.prepare.quality.duplicates import DIGEST_BYTES
from finetune_trainer.prepare.quality.nearduplicates import FINGERPRINT, Words
from finetune_trainer.prepare.tokenizing.overlength import CUTS
from finetune_trainer.prepare.tokenizing.tokens import Cut, Sample
from finetune_trainer.prepared.manifest import DataFile
from finetune_trainer.prepared.split import SIDES, Side

SCHEMA: Final = pa.schema(
    [
        ("side", pa.uint8()),
        ("shard", pa.uint32()),
        ("row", pa.uint32()),
        ("length", pa.int32()),
        ("supervised", pa.int32()),
        ("completion", pa.int32()),
        ("stop", pa.int32()),
        ("cut", pa.uint8()),
        ("where", pa.string()),
        ("label", pa.string()),
        ("personal", pa.string()),
        ("digest", pa.binary(DIGEST_BYTES)),
        ("fingerprint", pa.binary(8 * FINGERPRINT)),
    ]
)
"""Columns of a row. ``side`` and ``cut`` are positions in SIDES and CUTS; ``shard`` counts those of
the part and side; ``completion`` is the length of the last answer and ``stop`` its last token (-1:
cut off, elsewhere, or no answer); ``personal`` counts kinds, as JSON; ``digest`` and
``fingerprint`` are null where duplicates are not looked for."""

ROWS: Final = 1 << 13
"""Rows that are held, and judged, at once."""


class Fault(Record):
    """A record that cannot be used."""

    reason: str
    """CamelCase word."""
    message: str
    """What is wrong, and where."""


class Preview(Record):
    """A sample to look at."""

    sample: int
    """Its row among the facts."""
    shown: dict[str, Any]
    """As the report has it."""


class PartSummary(Record):
    """What else there is to say of a part; it is written last, and makes the part done."""

    format: Format | None = None
    """Format of its source, where any record tells."""
    records: int
    """Records read, with those that cannot be used."""
    training_drafts: int
    """Drafts among which duplicates were looked for."""
    duplicates: int
    """Drafts left out since the part had them before."""
    overlength: int
    """Samples left out for their length."""
    split: int
    """Documents that became several samples."""
    reasons: dict[str, int]
    """Records that cannot be used, by reason."""
    faults: list[Fault]
    """The first of them."""
    languages: dict[str, int]
    """Languages of some drafts."""
    previews: dict[Side, list[Preview]]
    """The first samples of each side."""
    shards: dict[Side, list[DataFile]]
    """Files of the samples."""


class FactsWriter:
    """Writes the rows of a part to a file."""

    def __init__(self, path: Path) -> None:
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        self._file = pa.ipc.new_file(str(path), SCHEMA, options=options)
        self._columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
        self.rows = 0
        """Rows so far."""

    def add(
        self,
        sample: Sample,
        shard: int,
        row: int,
        cut: Cut,
        digest: bytes | None,
        fingerprint: npt.NDArray[np.uint64] | None,
    ) -> None:
        """Note a sample, which stands in that row of a shard."""
        draft = sample.draft
        stops = sample.spans and cut != "Completion" and not draft.goes_on
        values = (
            SIDES.index(draft.side), shard, row, len(sample.ids), sample.supervised,
            len(sample.ids) - sample.prompt_length,
            int(sample.ids[-1]) if stops else -1,
            CUTS.index(cut), draft.where, draft.label,
            json.dumps(dict(draft.personal)) if draft.personal else None,
            digest, None if fingerprint is None else fingerprint.tobytes(),
        )  # fmt: skip
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)
        self.rows += 1
        if self.rows % ROWS == 0:
            self._flush()

    def close(self) -> None:
        """Write what waits."""
        self._flush()
        self._file.close()

    def _flush(self) -> None:
        if not self._columns["row"]:
            return
        arrays = [pa.array(_storable(f, self._columns[f.name]), f.type) for f in SCHEMA]
        self._file.write_batch(pa.record_batch(arrays, schema=SCHEMA))
        for column in self._columns.values():
            column.clear()


class Facts:
    """Some rows, by column."""

    def __init__(self, batch: Any, first: int) -> None:
        self._batch = batch
        self.first = first
        """Row of the first of them in the part."""

    def __len__(self) -> int:
        return int(self._batch.num_rows)

    def numbers(self, name: str) -> npt.NDArray[Any]:
        """A column of numbers, shape [rows]."""
        found: npt.NDArray[Any] = self._batch.column(name).to_numpy()
        return found

    def texts(self, name: str, rows: npt.NDArray[np.int64]) -> list[str]:
        """Some values of a column of text, none of which is null."""
        found: list[str] = self._batch.column(name).take(pa.array(rows)).to_pylist()
        return found

    def having(self, name: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Which of some rows have a value."""
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


def read_facts(path: Path) -> Iterator[Facts]:
    """The rows of a file, ``ROWS`` at a time."""
    with pa.OSFile(str(path)) as source:
        file, first = pa.ipc.open_file(source), 0
        for i in range(file.num_record_batches):
            facts = Facts(file.get_batch(i), first)
            yield facts
            first += len(facts)


def _storable(column: Any, values: Sequence[Any]) -> Sequence[Any]:
    """Text that Arrow takes: file names and records may hold what is no Unicode."""
    if column.type != pa.string():
        return values
    return [v if v is None else v.encode(errors="replace").decode() for v in values]
