"""Where the workers of a run meet: a folder of the run in object storage.

<run>/parts/<digest>/
    00012.arrow     facts of a part
    00012.json      its PartSummary, written behind facts and shards: the part is done
    00012.failed    its verdict instead: a record of it cannot be used

Nobody waits for anything but these. A worker that is started again passes over what it has done;
the worker that gathers takes the parts in the order of the data, so the first fault of the data is
the run's, whoever met it and when. The folder goes when the run's data is prepared, or refused.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

from finetune_api.results import Failure
from finetune_trainer.failures import DataError, verdict
from finetune_trainer.prepare.mapping.facts import Facts, PartSummary, read_facts
from finetune_trainer.prepare.reading.parts import Part
from finetune_trainer.storage.objects import ObjectStore

log = logging.getLogger(__name__)

POLL_SECONDS: Final = 1.0
"""Between looks at the folder."""

CHECK_SECONDS: Final = 60.0
"""Between looks at the data, while waiting."""


class Meeting:
    """The folder of one run and one content digest.

    Args:
        store: the run's storage.
        uri: the folder.
        data_uri: prefix of the prepared data, where the shards are.
    """

    def __init__(self, store: ObjectStore, uri: str, data_uri: str) -> None:
        self._store, self._uri, self._data_uri = store, uri, data_uri
        self._known: dict[int, set[str]] = {}

    def done(self, parts: Iterable[Part]) -> set[int]:
        """Numbers of the parts that need not be mapped (again)."""
        there = self._endings()
        sizes: dict[str, int] | None = None
        found = set()
        for part in parts:
            if "failed" in there.get(part.number, ()):
                found.add(part.number)
            elif "json" in there.get(part.number, ()):
                sizes = self._sizes() if sizes is None else sizes
                shards = [f for files in self._summary(part).shards.values() for f in files]
                if all(sizes.get(f"{self._data_uri}/{f.name}") == f.bytes for f in shards):
                    found.add(part.number)
        return found

    def first_failed(self) -> int | None:
        """Number of the first part that has a verdict."""
        failed = [number for number, endings in self._endings().items() if "failed" in endings]
        return min(failed, default=None)

    def leave(self, part: Part, said: PartSummary, facts: Path) -> None:
        """A part is done."""
        self._store.upload(facts, self._name(part, "arrow"))
        facts.unlink()
        self._store.put(self._name(part, "json"), _text(said.to_json()))

    def leave_failure(self, part: Part, error: DataError) -> None:
        """A record of a part cannot be used."""
        self._store.put(self._name(part, "failed"), _text(verdict(error).to_json()))

    def wait(self, part: Part, meanwhile: Callable[[], None]) -> PartSummary:
        """What there is to say of a part, once it is done.

        Args:
            meanwhile: is called now and then.

        Raises:
            DataError: the part's verdict.
        """
        looked, checked = False, time.monotonic()
        while True:
            endings = self._known.get(part.number, set())
            if "failed" in endings:
                said = Failure.model_validate_json(self._store.get(self._name(part, "failed")))
                raise DataError(said.reason, said.message)
            if "json" in endings:
                return self._summary(part)
            if looked:
                time.sleep(POLL_SECONDS)
            looked, self._known = True, self._endings()
            if time.monotonic() - checked > CHECK_SECONDS:
                checked = time.monotonic()
                log.info("waiting for part %d of another worker", part.number)
                meanwhile()

    def facts(self, part: Part, scratch: Path) -> Iterator[Facts]:
        """The facts of a part that is done."""
        path = scratch / "gathered.arrow"
        self._store.download(self._name(part, "arrow"), path)
        yield from read_facts(path)
        path.unlink()

    def end(self) -> None:
        """Nobody meets here any more."""
        self._store.delete([info.uri for info in self._store.list(f"{self._uri}/")])

    def _name(self, part: Part, ending: str) -> str:
        return f"{self._uri}/{part.number:05d}.{ending}"

    def _summary(self, part: Part) -> PartSummary:
        return PartSummary.model_validate_json(self._store.get(self._name(part, "json")))

    def _endings(self) -> dict[int, set[str]]:
        found: dict[int, set[str]] = {}
        for info in self._store.list(f"{self._uri}/"):
            number, _, ending = info.uri.rpartition("/")[2].partition(".")
            found.setdefault(int(number), set()).add(ending)
        return found

    def _sizes(self) -> dict[str, int]:
        return {info.uri: info.size for info in self._store.list(f"{self._data_uri}/shards/")}


def _text(raw: object) -> bytes:
    return json.dumps(raw, ensure_ascii=False).encode(errors="replace")
