"""What map leaves of each input split, in a folder of the run in object storage.

<run>/splits/<digest>/
    00012.arrow     statistics of its samples
    00012.json      its SplitSummary, written behind statistics and shards: the split is done
    00012.failed    its failure instead: a record of it cannot be used

A pod that is started again passes over the splits that are done. The reduce takes them in the order
of the data, so the first fault of the data is the run's, whoever met it and when. The folder goes
when the run's data is prepared, or refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from finetune_api.results import Failure
from finetune_trainer.failures import DataError, failure_of
from finetune_trainer.prepare.mapping.statistics import (
    SampleStatistics,
    SplitSummary,
    read_statistics,
)
from finetune_trainer.prepare.reading.inputsplits import InputSplit
from finetune_trainer.storage.objects import ObjectStore


class SplitResults:
    """The folder of one run and one content digest.

    Args:
        store: the run's storage.
        uri: the folder.
        data_uri: prefix of the prepared data, where the shards are.
    """

    def __init__(self, store: ObjectStore, uri: str, data_uri: str) -> None:
        self._store, self._uri, self._data_uri = store, uri, data_uri

    def done(self, splits: Iterable[InputSplit]) -> set[int]:
        """Numbers of the splits that need not be mapped (again)."""
        there = self._endings()
        sizes: dict[str, int] | None = None
        found = set()
        for split in splits:
            if "failed" in there.get(split.number, ()):
                found.add(split.number)
            elif "json" in there.get(split.number, ()):
                sizes = self._sizes() if sizes is None else sizes
                shards = [f for files in self.summary(split).shards.values() for f in files]
                if all(sizes.get(f"{self._data_uri}/{f.name}") == f.bytes for f in shards):
                    found.add(split.number)
        return found

    def empty(self) -> bool:
        """Whether nothing is left of any split."""
        return not self._endings()

    def first_failed(self) -> int | None:
        """Number of the first split that has failed."""
        failed = [number for number, endings in self._endings().items() if "failed" in endings]
        return min(failed, default=None)

    def save(self, split: InputSplit, summary: SplitSummary, statistics: Path) -> None:
        """A split is done."""
        self._store.upload(statistics, self._name(split.number, "arrow"))
        statistics.unlink()
        self._store.put(self._name(split.number, "json"), _text(summary.to_json()))

    def save_failure(self, split: InputSplit, error: DataError) -> None:
        """A record of a split cannot be used."""
        self._store.put(self._name(split.number, "failed"), _text(failure_of(error).to_json()))

    def check(self) -> None:
        """Raises the first failure in the order of the data.

        Raises:
            DataError: that failure.
        """
        number = self.first_failed()
        if number is not None:
            text = self._store.get(self._name(number, "failed"))
            failure = Failure.model_validate_json(text)
            raise DataError(failure.reason, failure.message)

    def summary(self, split: InputSplit) -> SplitSummary:
        """What there is to say of a split that is done."""
        return SplitSummary.model_validate_json(self._store.get(self._name(split.number, "json")))

    def statistics(self, split: InputSplit, scratch: Path) -> Iterator[SampleStatistics]:
        """The statistics of a split that is done."""
        path = scratch / "statistics-read.arrow"
        self._store.download(self._name(split.number, "arrow"), path)
        yield from read_statistics(path)
        path.unlink()

    def remove(self) -> None:
        """The folder is not needed any more."""
        self._store.delete([info.uri for info in self._store.list(f"{self._uri}/")])

    def _name(self, number: int, ending: str) -> str:
        return f"{self._uri}/{number:05d}.{ending}"

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
