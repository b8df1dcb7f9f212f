"""``slices.arrow`` of prepared data: the values of the fields of ``evaluation.slices``.

One dictionary-encoded column of texts for each field; its rows are those of the test index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import pyarrow as pa

SLICES: Final = "slices.arrow"
MOST_VALUES: Final = 32
"""Values of a field that are told apart in a test set, besides NONE."""
NONE: Final = "(none)"
"""Value of records that have none."""
OTHER: Final = "(other)"
"""Value of records whose value is rarer than the ``MOST_VALUES`` most frequent ones."""


def write_slices(path: Path, values: Mapping[str, Sequence[str]]) -> None:
    """Write the values of all test samples, by field."""
    columns = [pa.array(texts, pa.string()).dictionary_encode() for texts in values.values()]
    table = pa.table(columns, names=list(values))
    with pa.ipc.new_file(str(path), table.schema) as file:
        file.write_table(table)


def read_slices(path: Path) -> dict[str, list[str]]:
    """Read what ``write_slices`` has written."""
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    return {name: table[name].to_pylist() for name in table.schema.names}
