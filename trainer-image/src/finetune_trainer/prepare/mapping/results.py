"""Results of map for each input split, in a folder of the run in object storage.

<run>/splits/<digest>/
    00012.arrow     statistics of its samples
    00012.json      its SplitSummary, written after statistics and shards: the split is done
    00012.failed    its failure, in place of a summary: a record cannot be used

A restarted pod skips the splits that are done. The reduce reads the results in the order of the
data, so the run reports the first fault of the data, independent of which pod found it and when.
The folder is deleted when the run's data is prepared or rejected.
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
    """The results folder of one run and one content digest.

    Args:
        store: storage of the run.
        uri: of the folder.
        data_uri: prefix of the prepared data, where the shards are.
    """

    def __init__(self, store: ObjectStore, uri: str, data_uri: str) -> None:
        self._store, self._uri, self._data_uri = store, uri, data_uri

    def done(self, splits: Iterable[InputSplit]) -> set[int]:
        """Numbers of the splits that have failed, or are mapped with all their shards present."""
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
        """Whether the folder has no results."""
        return not self._endings()

    def first_failed(self) -> int | None:
        """Number of the first failed split; None where no split has failed."""
        failed = [number for number, endings in self._endings().items() if "failed" in endings]
        return min(failed, default=None)

    def save(self, split: InputSplit, summary: SplitSummary, statistics: Path) -> None:
        """Save the results of a split, which is then done. Deletes the local statistics file."""
        self._store.upload(statistics, self._name(split.number, "arrow"))
        statistics.unlink()
        self._store.put(self._name(split.number, "json"), _text(summary.to_json()))

    def save_failure(self, split: InputSplit, error: DataError) -> None:
        """Save the failure of a split."""
        self._store.put(self._name(split.number, "failed"), _text(failure_of(error).to_json()))

    def check(self) -> None:
        """Raise the first failure in the order of the data, if any.

        Raises:
            DataError: that failure.
        """
        number = self.first_failed()
        if number is not None:
            text = self._store.get(self._name(number, "failed"))
            failure = Failure.model_validate_json(text)
            raise DataError(failure.reason, failure.message)

    def summary(self, split: InputSplit) -> SplitSummary:
        """The summary of a split that is done."""
        return SplitSummary.model_validate_json(self._store.get(self._name(split.number, "json")))

    def statistics(self, split: InputSplit, scratch: Path) -> Iterator[SampleStatistics]:
        """The statistics of a split that is done."""
        path = scratch / "statistics-read.arrow"
        self._store.download(self._name(split.number, "arrow"), path)
        yield from read_statistics(path)
        path.unlink()

    def remove(self) -> None:
        """Delete the folder."""
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
