"""Lists the objects of a data source, in object storage or on a mounted claim.

A source is one object, a pattern (``*`` matches within a folder, ``**`` across folders), or a
prefix that ends in '/' and matches every object below it with a data suffix.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Final

from finetune_api.sources import BUILT_IN, DataSource
from finetune_trainer.failures import UserError
from finetune_trainer.instructions.records import as_json_lines
from finetune_trainer.prepare.reading.records import SUFFIXES, readable
from finetune_trainer.prepared.split import Side
from finetune_trainer.storage.claim_paths import claim_path, etag_of, open_listed
from finetune_trainer.storage.objects import ObjectStore

_SHOWN: Final = 5
"""Existing objects shown in a message."""


@dataclass(frozen=True)
class DataObject:
    """One object of a source."""

    uri: str
    size: int
    """In bytes."""
    etag: str
    """Changes with the content."""
    place: ObjectStore | Path | bytes
    """The store of the object, its file on a claim, or its content."""

    def open(self) -> BinaryIO:
        """Open the object as a binary stream.

        Raises:
            DataError: 'ObjectChanged', also from later reads: the object differs from the listed.
        """
        if isinstance(self.place, bytes):
            return io.BytesIO(self.place)
        if isinstance(self.place, Path):
            return open_listed(self.place, self.uri, self.etag)
        return self.place.read_stream(self.uri, etag=self.etag)


@dataclass(frozen=True)
class Source:
    """A data source with its objects."""

    side: Side
    """The list of the spec that contains it."""
    name: str
    """Name of the set, unique in its list."""
    spec: DataSource
    objects: Sequence[DataObject]


def resolve(
    uri: str, store: ObjectStore, environ: Mapping[str, str] = os.environ
) -> list[DataObject]:
    """Return the objects of a source, ordered by address; at least one.

    Raises:
        UserError: 'NoObjects', with the address and existing objects; 'InvalidAddress', a path
            leaves its claim.
    """
    if uri == BUILT_IN:
        content = as_json_lines()
        return [DataObject(uri, len(content), hashlib.sha256(content).hexdigest(), content)]
    folder = uri[: _literal_length(uri)].rpartition("/")[0] + "/"
    wanted = _matcher(uri)
    near = _candidates(uri, folder, store, environ)
    found = sorted((o for o in near if wanted.fullmatch(o.uri)), key=lambda o: o.uri)
    if uri.endswith("/"):
        found = [o for o in found if readable(o.uri)]
    if not found:
        raise _nothing(uri, folder, list(islice(_below(folder, store, environ), 1000)))
    return found


def changed(
    before: Iterable[DataObject], now: Iterable[DataObject], may_grow: bool = False
) -> str | None:
    """Return the address of the first object that differs between two listings of a source; with
    ``may_grow``, new objects are ignored."""
    was, is_now = ({(o.uri, o.etag, o.size) for o in found} for found in (before, now))
    return min((uri for uri, *_ in (was - is_now if may_grow else was ^ is_now)), default=None)


def _candidates(
    uri: str, folder: str, store: ObjectStore, environ: Mapping[str, str]
) -> Iterator[DataObject]:
    """Yield objects that may match: those with the literal prefix where the store can filter."""
    literal = uri[: _literal_length(uri)]
    if uri.startswith("pvc://"):
        yield from _below(folder, store, environ)
    elif literal == uri and not uri.endswith("/"):
        info = store.head(uri)
        if info is not None:
            yield DataObject(info.uri, info.size, info.etag, store)
    else:
        yield from _below(literal, store, environ)


def _below(folder: str, store: ObjectStore, environ: Mapping[str, str]) -> Iterator[DataObject]:
    """Yield every object whose address has the prefix (on a claim: a folder, ending in '/')."""
    if not folder.startswith("pvc://"):
        for info in store.list(folder):
            yield DataObject(info.uri, info.size, info.etag, store)
        return
    root = claim_path(folder, environ)
    for path in sorted(root.rglob("*")):
        if path.is_file():
            stat = path.stat()
            name = path.relative_to(root).as_posix()
            yield DataObject(folder + name, stat.st_size, etag_of(stat), path)


def _literal_length(uri: str) -> int:
    """Number of characters before the first wildcard."""
    return (uri + "*").index("*")


def _matcher(uri: str) -> re.Pattern[str]:
    if uri.endswith("/"):
        return re.compile(re.escape(uri) + ".*", re.DOTALL)
    parts = re.split(r"(\*\*/|\*\*|\*)", uri)
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*"}
    return re.compile("".join(wild.get(part) or re.escape(part) for part in parts), re.DOTALL)


def _nothing(uri: str, folder: str, there: list[DataObject]) -> UserError:
    if any(o.uri.startswith(f"{uri}/") for o in there):
        remedy = f"it is a folder: end the address with '/' ({uri}/)"
    elif there:
        names = ", ".join(o.uri.removeprefix(folder) for o in there[:_SHOWN])
        more = f" and {len(there) - _SHOWN} more" if len(there) > _SHOWN else ""
        remedy = f"below {folder} there are: {names}{more}"
    else:
        remedy = f"there is nothing below {folder}; check the address"
    return UserError(
        "NoObjects",
        f"{uri}: no object matches; {remedy}. Data objects end in {', '.join(SUFFIXES)}",
    )
