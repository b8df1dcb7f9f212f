"""Helpers of the map and reduce tests: prepare jobs with several pods, data of all kinds, and a
record of the mapped input splits."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetune_api.results import PreparedSummary
from finetune_api.run_spec import RunSpec
from finetune_trainer.failures import StorageUnavailable
from finetune_trainer.prepare.mapping.progress import ProgressCallback
from finetune_trainer.prepare.mapping.reader import Batch, Reader
from finetune_trainer.prepare.pipeline import Step, prepare
from finetune_trainer.prepare.reading.inputsplits import InputSplit
from finetune_trainer.prepared.dataset import PreparedData
from finetune_trainer.prepared.split import SIDES, Side
from finetune_trainer.storage.objects import ObjectStore
from trainer.prepare_helpers import OneStore, lines, pairs

ALL_DROP = {"faultyRecords": "Drop", "contamination": "Drop", "overlength": "Drop",
            "nearDuplicates": "Drop", "personalData": "Redact"}  # fmt: skip
"""Quality settings that drop or redact everything they find."""


@dataclass
class PrepareJob:
    """A prefix of the bucket, and the pods of a prepare job over its objects."""

    store: ObjectStore
    run_spec_for: Callable[..., RunSpec]
    scratch: Iterator[Path]
    root: str

    def put(self, name: str, data: bytes) -> str:
        self.store.put(f"{self.root}/{name}", data)
        return f"{self.root}/{name}"

    def run_spec(self, data: dict[str, Any], workers: int, **spec: Any) -> RunSpec:
        return self.run_spec_for(
            data=data, output={"destination": f"{self.root}/out"}, prepare={"workers": workers},
            **spec,
        )  # fmt: skip

    def run_pod(
        self, run_spec: RunSpec, step: Step, worker: int = 0, say: ProgressCallback | None = None,
        processes: int | None = None,
    ) -> PreparedSummary | None:  # fmt: skip
        """Run one pod."""
        stores = OneStore(run_spec, self.store)
        return prepare(
            run_spec, stores, next(self.scratch), say, step=step, worker=worker, processes=processes
        )

    def prepare(
        self, run_spec: RunSpec, processes: int | None = None, say: ProgressCallback | None = None
    ) -> PreparedSummary:
        """Run all pods: with one worker, a pod for all steps; else the map pods, the last worker
        first, and a reduce pod. Only worker 0 reports its progress."""
        workers = run_spec.spec.prepare.workers
        if workers == 1:
            summary = self.run_pod(run_spec, "All", 0, say, processes)
        else:
            for worker in reversed(range(workers)):
                callback = say if worker == 0 else None
                assert self.run_pod(run_spec, "Map", worker, callback, processes) is None
            summary = self.run_pod(run_spec, "Reduce", 0, None, processes)
        assert summary is not None
        return summary

    def files(self, prefix: str) -> dict[str, bytes]:
        return {o.uri: self.store.get(o.uri) for o in self.store.list(prefix)}

    def clear(self) -> None:
        """Delete all output."""
        self.store.delete([o.uri for o in self.store.list(f"{self.root}/out/")])

    def results_left(self, run_spec: RunSpec) -> list[str]:
        """Addresses of the run's intermediate results."""
        return [o.uri for o in self.store.list(f"{run_spec.run_uri}/splits/")]

    def samples(self, summary: PreparedSummary) -> dict[str, list[Any]]:
        """All samples by side, in order: set name, token ids, supervised mask."""
        data = PreparedData.open(self.store, summary.uri, next(self.scratch))
        found = {}
        for side in SIDES:
            index = data.index(side)
            names = [data.manifest.sets[i].name for i in index.set]
            samples = data.samples(side, range(len(index)))
            found[side] = [
                (name, s.ids.tolist(), s.supervised.tolist())
                for name, s in zip(names, samples, strict=True)
            ]
        return found

    def partition(self, summary: PreparedSummary, side: Side) -> set[frozenset[str]]:
        """Prompts of the samples of each group of a held-out side."""
        data = PreparedData.open(self.store, summary.uri, next(self.scratch))
        groups = data.index(side).groups.tolist()
        found: dict[int, set[str]] = {}
        for group, sample in zip(groups, data.references(side, range(len(groups))), strict=True):
            found.setdefault(group, set()).add(sample.prompt)
        return {frozenset(prompts) for prompts in found.values()}


def spy_on_reads(monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> list[int]:
    """Return a list that grows by the number of each input split that a pod begins to map.

    Args:
        fail_at: number of a split whose first read raises StorageUnavailable.
    """
    mapped: list[int] = []
    read = Reader.read

    def spied(self: Reader, split: InputSplit) -> Iterator[Batch]:
        fails = split.number == fail_at and fail_at not in mapped
        mapped.append(split.number)
        if fails:
            raise StorageUnavailable("StorageUnreachable", "gone")
        return read(self, split)

    monkeypatch.setattr(Reader, "read", spied)
    return mapped


def mixed_records(seed: int, count: int) -> list[dict[str, str]]:
    """Random records: some equal, some similar, some too long, some with an e-mail address."""
    draw = random.Random(seed)
    words = [f"w{i}" for i in range(300)]
    made: list[dict[str, str]] = []
    for i in range(count):
        kind = draw.random()
        prompt = " ".join(draw.choices(words, k=draw.randint(3, 25)))
        if made and kind < 0.2:
            made.append(dict(draw.choice(made)))
        elif made and kind < 0.4:
            like = draw.choice(made)
            made.append({**like, "prompt": like["prompt"] + " more"})
        elif kind < 0.5:
            made.append({"prompt": prompt * 4, "completion": f" {i} it is"})
        elif kind < 0.6:
            made.append({"prompt": f"{prompt} a{i}@example.org", "completion": " yes"})
        else:
            made.append({"prompt": prompt, "completion": f" {words[i]} {words[i + 1]}"})
    return made


def put_mixed_data(job: PrepareJob, seed: int, **quality: Any) -> dict[str, Any]:
    """Write two training sources, in objects of all kinds and sizes, and a test set; return the
    data settings. Under ``faultyRecords`` Drop, some records are faulty."""
    made = mixed_records(seed, 120)
    bad = b'{"prompt": "x"\n' if quality.get("faultyRecords") == "Drop" else b""
    nothing = lines({"prompt": "x", "completion": ""}) if bad else b""
    job.put("a/0.jsonl", b"\xef\xbb\xbf" + lines(*made[:50]) + bad)
    for i in range(4):
        job.put(f"a/{1 + i}.jsonl", lines(*made[50 + i : 54 + i]))
    job.put("b/0.jsonl.gz", gzip.compress(lines(*made[60:75]) + nothing))
    rows = "".join(f'"{r["prompt"]}","{r["completion"]}"\n' for r in made[75:90])
    job.put("b/1.csv", f"prompt,completion\n{rows}".encode())
    job.put("b/2.jsonl", bad + lines(*made[90:105])[:-1])
    job.put("b/3.json", json.dumps([*made[105:], *([[]] if bad else [])], indent=2).encode())
    held = job.put("held.jsonl", lines(*made[10:12], *pairs(9)))
    return {
        "train": [{"name": name, "source": f"{job.root}/{name}/"} for name in ("a", "b")],
        "test": [{"name": "held", "source": held}],
        "split": {"validation": "0.2"},
        "quality": quality,
    }  # fmt: skip
