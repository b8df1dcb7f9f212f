"""Reads CSV: a header line with the field names, then rows in which every value is text."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import count
from typing import Final

from finetune_trainer.failures import DataError
from finetune_trainer.personal import excerpt
from finetune_trainer.prepare.reading.lines import check_record, decoded

CELL_CHARACTERS: Final = 1 << 24
"""Maximum characters of a CSV field: an unclosed quote must not read the whole object."""
MOST_COMMAS: Final = 1 << 20
"""Maximum commas of a row: a field takes 60 bytes of memory, however short."""
csv.field_size_limit(CELL_CHARACTERS)  # process-wide: the csv module has no limit per reader


def csv_rows(uri: str, lines: Iterable[bytes]) -> Iterator[tuple[int, dict[str, str] | DataError]]:
    """Yield the number and the fields of each row below the header; in place of the fields of an
    unreadable row, its 'MalformedRecord'. Rows are counted from 1, not lines: quoted fields may
    hold line breaks. Empty lines are skipped.

    Raises:
        DataError: 'MalformedObject', the header has an empty or repeated name, or a row is too
            long.
    """
    # Maps, since a generator would end at the first undecodable line.
    places = map("line {}".format, count(1))
    taken = _RowSize(uri)
    texts = map(partial(decoded, uri), places, map(taken.count, lines))
    rows = csv.reader(texts, strict=True)
    filled = filter(None, rows)
    names = _header(uri, filled)
    for row in count(1):
        taken.begin(row)
        try:
            cells = next(filled, None)
            if cells is None:
                return
            yield row, _named(uri, row, rows.line_num, names, cells)
        except csv.Error as error:
            yield row, _bad_row(uri, row, rows.line_num, str(error))
        except DataError as error:
            if error.reason != "MalformedRecord":  # the object as a whole cannot be read
                raise
            yield row, error


class _RowSize:
    """Bounds the bytes and the commas of a row: the csv module bounds only the size of a field."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self.begin(0)

    def begin(self, row: int) -> None:
        self._place = f"row {row}" if row else "the header"
        self._size = self._commas = 0

    def count(self, line: bytes) -> bytes:
        """Return the line; raise 'MalformedObject' if the row is too long with it."""
        self._size += len(line)
        self._commas += line.count(b",")
        check_record(self._uri, self._place, self._size)
        if self._commas > MOST_COMMAS:
            raise DataError(
                "MalformedObject",
                f"{self._uri}, {self._place}: more than {MOST_COMMAS:,} commas; is a line break or"
                " a closing quote missing?",
            )
        return line


def _named(uri: str, row: int, line: int, names: list[str], cells: list[str]) -> dict[str, str]:
    if len(cells) != len(names):
        why = f"{len(cells)} fields, the header has {len(names)}"
        raise _bad_row(uri, row, line, why)
    return dict(zip(names, cells, strict=True))


def _header(uri: str, rows: Iterator[list[str]]) -> list[str]:
    try:
        names = next(rows, [])
    except csv.Error as error:
        names, shown = [""], str(error)
    else:
        shown = excerpt(",".join(names))
    remedy = "correct the header"
    if names[:1] == [""] and names[1:]:
        remedy += ", or write the table without its index (pandas: to_csv(..., index=False))"
    if "" in names or len(set(names)) < len(names):
        raise DataError(
            "MalformedObject",
            f"{uri}: the first line must name every field once; got {shown!r}; {remedy}",
        )
    return names


def _bad_row(uri: str, row: int, line: int, why: str) -> DataError:
    return DataError(
        "MalformedRecord",
        f"{uri}, row {row}: not CSV: {why} (up to line {line}); fields are separated by"
        ' commas; quote a field that holds a comma, a quote or a line break ("" is a quote)',
    )
