"""Reads Parquet, row by row; memory holds a batch of rows and the pages that they come from.

Objects are untrusted, and Parquet's encodings expand without bound: a kilobyte can declare a page
of 2 GiB, or refer a million times to one long text. The metadata may lie about it, so the memory of
the decoder is bounded by a limit of the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO, Final

import pyarrow as pa
import pyarrow.parquet as pq

from finetune_trainer.failures import DataError
from finetune_trainer.memory_limit import bounded_memory
from finetune_trainer.prepare.reading.lines import RECORD_BYTES, check_ratio, check_record

PARQUET_ROWS: Final = 1024
"""Maximum rows decoded per batch."""
BATCH_BYTES: Final = 8 << 20
"""Bytes of a batch of rows, by the metadata; at least one row."""
DECODER_BYTES: Final = 1 << 30
"""Maximum memory for decoding a batch, beside what the process has."""
BUFFER_BYTES: Final = 1 << 20
"""Read buffer of a column: without one, the column's part of a whole row group is read at once."""


def parquet_rows(uri: str, stream: BinaryIO) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """Yield the number and the fields of each row; in place of the fields of an unreadable row, its
    'MalformedRecord'.

    Raises:
        DataError: 'MalformedObject', the file is damaged or a decompression bomb.
    """
    row = 0
    try:
        with bounded_memory(DECODER_BYTES):
            table = _opened(stream)
            batches = table.iter_batches(batch_size=_batch_rows(uri, table.metadata))
        while True:
            with bounded_memory(DECODER_BYTES):
                batch = next(batches, None)
                rows = [] if batch is None else _rows(uri, row, batch)
            if batch is None:
                return
            for fields in rows:
                row += 1
                yield row, fields
    except MemoryError:
        raise DataError(
            "MalformedObject",
            f"{uri}: decoding the rows after row {row} needs more than {DECODER_BYTES >> 20} MiB of"
            " memory: pages or repeated values are too large; write the file with smaller row"
            " groups and pages, or as .jsonl.zst",
        ) from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(
            "MalformedObject",
            f"{uri}: cannot be read as Parquet after row {row}: {_first_line(error)};"
            " write the file again",
        ) from None


def _opened(stream: BinaryIO) -> Any:
    """Open a file, with malloc for its memory: Arrow's own pool reserves memory ahead, so that a
    limit would not reach what it gives out."""
    pool = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        return pq.ParquetFile(pa.PythonFile(stream, mode="r"), buffer_size=BUFFER_BYTES)
    finally:
        pa.set_memory_pool(pool)


def _batch_rows(uri: str, metadata: Any) -> int:
    """Return the rows of a batch, from the largest mean row of any row group."""
    mean = 1
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        columns = [group.column(i) for i in range(group.num_columns)]
        packed = sum(column.total_compressed_size for column in columns)
        check_ratio(uri, group.total_byte_size, packed)
        mean = max(mean, group.total_byte_size // max(1, group.num_rows))
    return max(1, min(PARQUET_ROWS, BATCH_BYTES // mean))


def _rows(uri: str, before: int, batch: Any) -> list[dict[str, Any] | DataError]:
    """Return the fields of a batch's rows.

    Args:
        before: number of rows before the batch.
    """
    if batch.nbytes > RECORD_BYTES:
        for i in range(len(batch)):
            check_record(uri, f"row {before + i + 1}", batch.slice(i, 1).nbytes)
    return [_fields(uri, before + i + 1, batch, i) for i in range(len(batch))]


def _fields(uri: str, row: int, batch: Any, i: int) -> dict[str, Any] | DataError:
    fields = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            fields[name] = _without_nulls(column[i].as_py())
        except UnicodeDecodeError:
            return DataError(
                "MalformedRecord",
                f"{uri}, row {row}: field {name!r} is not UTF-8 text; write the file from UTF-8",
            )
        except (pa.ArrowException, ValueError, OverflowError, LookupError) as error:
            return DataError(
                "MalformedRecord",
                f"{uri}, row {row}: field {name!r} of type {column.type} has no value in Python:"
                f" {_first_line(error)}; write it as a string",
            )
    return fields


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _without_nulls(value: Any) -> Any:
    """Remove null fields of structs. A Parquet struct has the keys of all rows: a null is a key
    that this row lacks (the argument of another tool), and must not be trained as a null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
