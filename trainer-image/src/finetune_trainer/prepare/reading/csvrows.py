"""Reads CSV: a header line with the field names, then rows in which every value is text."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import count
from typing import Final

from finetune_trainer.failures import DataError
from finetune_trainer.prepare.quality.personal import excerpt
from finetune_trainer.prepare.reading.lines import decoded

CELL_CHARACTERS: Final = 1 << 24
"""Maximum characters of a CSV field: an unclosed quote must not read the whole object."""
csv.field_size_limit(CELL_CHARACTERS)  # process-wide: the csv module has no limit per reader


def csv_rows(uri: str, lines: Iterable[bytes]) -> Iterator[tuple[int, dict[str, str] | DataError]]:
    """Yield the number and the fields of each row below the header; in place of the fields of an
    unreadable row, its 'MalformedRecord'. Rows are counted from 1, not lines: quoted fields may
    hold line breaks. Empty lines are skipped.

    Raises:
        DataError: 'MalformedObject', the header has an empty or repeated name.
    """
    # A map, since a generator would end at the first undecodable line.
    places = map("line {}".format, count(1))
    rows = csv.reader(map(partial(decoded, uri), places, lines), strict=True)
    filled = filter(None, rows)
    names = _header(uri, filled)
    for row in count(1):
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
