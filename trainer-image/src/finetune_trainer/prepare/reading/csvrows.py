"""Rows of CSV: a header line that names the fields, then rows in which every value is text."""

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
"""Most characters of a field of CSV: a quote that is never closed must not read on to the end."""
csv.field_size_limit(CELL_CHARACTERS)  # of the process: the module has no other way


def csv_rows(uri: str, lines: Iterable[bytes]) -> Iterator[tuple[int, dict[str, str] | DataError]]:
    """The rows below the header and their numbers; of a row that cannot be read the
    'MalformedRecord' that names it. Quoted fields may hold line breaks, so rows are counted (from
    1), not lines; empty lines are passed over.

    Raises:
        DataError: 'MalformedObject' where the header does not name every field once.
    """
    # A map, since a generator would end at the first line that is no text.
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
            if error.reason != "MalformedRecord":  # of the object, which ends here
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
        f"{uri}, row {row}: not CSV: {why} (up to line {line}); fields are parted by commas;"
        ' one that holds a comma, a quote or a line break stands in quotes ("" is a quote)',
    )
