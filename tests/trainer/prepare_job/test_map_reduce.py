"""Map and reduce: the same bytes at any number of pods and processes, the first fault of the data,
and nothing done twice."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import multiprocessing
import os
import random
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_api.names import ENV_PVC_ROOT
from finetune_api.results import PreparedSummary
from finetune_api.run_spec import RunSpec
from finetune_trainer.failures import (
    DataError,
    NodeFailure,
    OutOfMemory,
    StorageUnavailable,
    TrainerError,
)
from finetune_trainer.prepare.mapping import map as map_module
from finetune_trainer.prepare.mapping import pool, reader, writer
from finetune_trainer.prepare.mapping.reader import Batch, Reader, Reading, Say
from finetune_trainer.prepare.pipeline import Step, prepare
from finetune_trainer.prepare.reading import inputsplits
from finetune_trainer.prepare.reading.inputsplits import ByteRange, InputSplit, deal
from finetune_trainer.prepare.reading.lines import count_lines, lines_between
from finetune_trainer.prepare.reading.sources import DataObject
from finetune_trainer.prepare.reducing import reduce as reduce_module
from finetune_trainer.prepared import dataset
from finetune_trainer.prepared.dataset import PreparedData
from finetune_trainer.prepared.split import SIDES
from finetune_trainer.storage.objects import ObjectStore
from trainer.prepare_helpers import OneStore, lines, pairs


@pytest.fixture(autouse=True)
def small_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputsplits, "SPLIT_BYTES", 1500)
    monkeypatch.setattr(writer, "SHARD_TOKENS", 300)
    monkeypatch.setattr(reader, "BATCH_RECORDS", 7)
    monkeypatch.setattr(dataset, "PIECE_TOKENS", 50)


@dataclass
class Workshop:
    """Data at an address, and workers on it."""

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

    def work(
        self, run_spec: RunSpec, step: Step, worker: int = 0, say: Say | None = None,
        processes: int | None = None,
    ) -> PreparedSummary | None:  # fmt: skip
        stores = OneStore(run_spec, self.store)
        return prepare(
            run_spec, stores, next(self.scratch), say, step=step, worker=worker, processes=processes
        )

    def prepare(
        self, run_spec: RunSpec, processes: int | None = None, say: Say | None = None
    ) -> PreparedSummary:
        """As pods do: several that map, the first last, and one that reduces; or one alone."""
        workers = run_spec.spec.prepare.workers
        for worker in range(workers - 1, -1, -1) if workers > 1 else ():
            told = say if worker == 0 else None
            assert self.work(run_spec, "Map", worker, told, processes) is None
        summary = self.work(
            run_spec,
            "Reduce" if workers > 1 else "All",
            0,
            say if workers == 1 else None,
            processes,
        )
        assert summary is not None
        return summary

    def files(self, prefix: str) -> dict[str, bytes]:
        return {o.uri: self.store.get(o.uri) for o in self.store.list(prefix)}

    def clear(self) -> None:
        self.store.delete([o.uri for o in self.store.list(f"{self.root}/out/")])

    def results_left(self, run_spec: RunSpec) -> list[str]:
        return [o.uri for o in self.store.list(f"{run_spec.run_uri}/splits/")]

    def samples(self, summary: PreparedSummary) -> dict[str, list[Any]]:
        """Every sample by side, in order: set, tokens and what is learned."""
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


@pytest.fixture
def at(
    store: ObjectStore, bucket: str, run_spec_for: Callable[..., RunSpec], tmp_path: Path
) -> Workshop:
    root = f"s3://{bucket}/{uuid.uuid4().hex[:8]}"
    return Workshop(store, run_spec_for, (tmp_path / str(i) for i in range(999)), root)


def records(seed: int, count: int) -> list[dict[str, str]]:
    """Records of which some are the same, some alike, some too long, and some hold an address."""
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


def data_of(at: Workshop, seed: int, **quality: Any) -> dict[str, Any]:
    """Two training sources in objects of all kinds and sizes, and a test set."""
    made = records(seed, 120)
    bad = b'{"prompt": "x"\n' if quality.get("faultyRecords") == "Drop" else b""
    nothing = lines({"prompt": "x", "completion": ""}) if bad else b""
    at.put("a/0.jsonl", b"\xef\xbb\xbf" + lines(*made[:50]) + bad)
    for i in range(4):
        at.put(f"a/{1 + i}.jsonl", lines(*made[50 + i : 54 + i]))
    at.put("b/0.jsonl.gz", gzip.compress(lines(*made[60:75]) + nothing))
    rows = "".join(f'"{r["prompt"]}","{r["completion"]}"\n' for r in made[75:90])
    at.put("b/1.csv", f"prompt,completion\n{rows}".encode())
    at.put("b/2.jsonl", bad + lines(*made[90:105])[:-1])
    at.put("b/3.json", json.dumps([*made[105:], *([[]] if bad else [])], indent=2).encode())
    held = at.put("held.jsonl", lines(*made[10:12], *pairs(9)))
    return {
        "train": [{"name": name, "source": f"{at.root}/{name}/"} for name in ("a", "b")],
        "test": [{"name": "held", "source": held}],
        "split": {"validation": "0.2"},
        "quality": quality,
    }  # fmt: skip


ALL_DROP = {"faultyRecords": "Drop", "contamination": "Drop", "overlength": "Drop",
            "nearDuplicates": "Drop", "personalData": "Redact"}  # fmt: skip


@pytest.mark.parametrize(
    ("runs", "seed", "quality"),
    [
        (((1, 1), (1, 3), (2, 1), (4, 1)), 1, ALL_DROP),
        (((1, 1), (3, 2)), 2, {}),
        (((1, 1), (1, 2), (4, 1)), 3, {"deduplicate": False, "contamination": "Drop"}),
    ],
)
@pytest.mark.parametrize("validation", ["0.2", "0"])
def test_any_number_of_pods_and_processes_writes_the_same_bytes(
    at: Workshop, runs: tuple[tuple[int, int], ...], seed: int, quality: dict[str, Any],
    validation: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    data = data_of(at, seed, **quality)
    data["split"] = {"validation": validation}
    short = {"training": {"maxLength": 128}}
    written, summaries = [], []
    for pods, processes in runs:
        run_spec = at.run_spec(data, pods, **short)
        summaries.append(at.prepare(run_spec, processes))
        written.append(at.files(f"{summaries[-1].uri}/"))
        assert at.results_left(run_spec) == []
        last = at.samples(summaries[-1])
        at.clear()
    assert all(files == written[0] for files in written[1:])
    assert all(summary == summaries[0] for summary in summaries[1:])
    assert len(last["train"]) > 20 and last["test"]
    assert bool(last["validation"]) == (validation != "0")
    assert len(summaries[0].dropped) >= (6 if quality is ALL_DROP else 1)

    monkeypatch.setattr(inputsplits, "SPLIT_BYTES", 1 << 30)
    whole = at.prepare(at.run_spec(data, 1, **short))
    assert at.samples(whole) == last, "where the cuts fall changes no sample"
    assert whole.dropped == summaries[0].dropped


def test_map_and_the_shards_find_the_same_contamination(
    at: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_of(at, 4, contamination="Drop")
    data["split"] = {"validation": "0"}
    found = []
    for in_map in (True, False):
        if not in_map:
            monkeypatch.setattr(map_module, "compared_in_map", lambda data: False)
            monkeypatch.setattr(reduce_module, "compared_in_map", lambda data: False)
        summary = at.prepare(at.run_spec(data, 1))
        report = json.loads(at.store.get(f"{summary.uri}/report.json"))
        found.append((report["contamination"], at.samples(summary), summary.dropped))
        at.clear()
    assert found[0] == found[1] and found[0][2]["Contaminated"] >= 2
    assert found[0][0]["comparedSamples"] == found[0][0]["heldOutSamples"] == 11


def test_data_that_is_there_is_used_again(at: Workshop) -> None:
    run_spec = at.run_spec(data_of(at, 5), 2)
    assert not at.prepare(run_spec).reused
    assert at.work(run_spec, "Map", 1) is None
    again = at.work(run_spec, "Reduce")
    assert again is not None and again.reused and at.results_left(run_spec) == []


@given(data=st.data())
@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_pods_that_die_and_come_again_in_any_order_change_nothing(
    at: Workshop, data: st.DataObject
) -> None:
    """Each pod is ended in the middle of its reading, some times, before it ends by itself."""
    made = data_of(at, 6, **ALL_DROP)
    expected = at.files(f"{at.prepare(at.run_spec(made, 1)).uri}/")
    at.clear()
    pods = data.draw(st.integers(2, 3))
    run_spec = at.run_spec(made, pods)
    ends = data.draw(st.lists(st.tuples(st.integers(0, pods - 1), st.integers(1, 6)), max_size=4))
    for pod, batches in ends:
        with suppress(StorageUnavailable):
            at.work(run_spec, "Map", pod, ending_after(batches))
    for pod in data.draw(st.permutations(range(pods))):
        at.work(run_spec, "Map", pod)
    summary = at.work(run_spec, "Reduce")
    assert summary is not None
    assert at.files(f"{summary.uri}/") == expected
    at.clear()


def ending_after(batches: int) -> Say:
    """Ends a pod behind so many batches, for its storage."""
    left = iter(range(batches))

    def say(reading: Reading) -> None:
        if next(left, None) is None:
            raise StorageUnavailable("StorageUnreachable", "gone")

    return say


# --- a process of the pool is killed -------------------------------------------------------------


def kill_one_process(reading: Reading) -> None:
    """Kills a process of the pool, as the kernel does for want of memory."""
    pool = [p for p in multiprocessing.active_children() if p.pid is not None]
    os.kill(pool[0].pid or 0, signal.SIGKILL)


@pytest.mark.parametrize(
    ("kills", "kind", "reason"),
    [(1, OutOfMemory, "ProcessKilled"), (0, NodeFailure, "ProcessLost")],
)
def test_a_killed_process_is_a_named_failure_and_the_next_try_goes_on(
    at: Workshop, kills: int, kind: type[TrainerError], reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    data = {"train": [{"source": at.put("m/0.jsonl", lines(*pairs(300)))}]}
    run_spec = at.run_spec(data, 1)
    counts = iter([0, kills])
    with monkeypatch.context() as patch, pytest.raises(kind) as caught:
        patch.setattr(pool, "count_oom_kills", lambda: next(counts))
        at.work(run_spec, "All", 0, kill_one_process, processes=2)
    assert isinstance(caught.value, TrainerError) and caught.value.reason == reason
    assert at.prepare(run_spec).train_samples > 200


# --- faults --------------------------------------------------------------------------------------


def faulty(at: Workshop) -> dict[str, Any]:
    """Parts 0 to 4 of one object, with faults in parts 1 and 3."""
    rows = [json.dumps(r).encode() + b"\n" for r in pairs(115)]
    assert 4 * 1500 < sum(map(len, rows)) < 5 * 1500
    rows[40] = b'{"prompt": "first", oops}\n'
    rows[90] = b'{"prompt": "second", oops}\n'
    return {"train": [{"source": at.put("f/0.jsonl", b"".join(rows))}]}


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_first_fault_of_the_data_wins_with_its_line(at: Workshop, workers: int) -> None:
    run_spec = at.run_spec(faulty(at), workers)
    with pytest.raises(DataError) as caught:
        at.prepare(run_spec)
    assert caught.value.reason == "MalformedRecord"
    assert f"{at.root}/f/0.jsonl, line 41, column 21" in caught.value.message
    assert at.results_left(run_spec) == []


@pytest.mark.parametrize(
    ("first", "second"),
    itertools.permutations(
        [
            b'{"prompt": "x", oops}\n',
            lines({"prompt": "x"}),
            lines({"prompt": "a@example.org", "completion": "x"}),
            lines({"prompt": "word " * 200, "completion": "x"}),
        ],
        2,
    ),
)
def test_of_two_faults_of_a_batch_the_first_in_the_data_wins(
    at: Workshop, first: bytes, second: bytes
) -> None:
    """Whichever step of the way meets it."""
    data = lines(*pairs(1)) + first + second
    quality = {"personalData": "Fail", "overlength": "Fail"}
    source = {"train": [{"source": at.put("n/0.jsonl", data)}], "quality": quality}
    with pytest.raises(DataError, match=r"n/0\.jsonl, line 2"):
        at.prepare(at.run_spec(source, 1, training={"maxLength": 64}))


def test_a_fault_of_a_held_out_set_comes_before_those_of_training_sets(at: Workshop) -> None:
    held = at.put("o/held.jsonl", lines(*pairs(3)) + b"oops\n")
    data = {**faulty(at), "test": [{"source": held}]}
    for pods in (1, 2):
        with pytest.raises(DataError, match=r"o/held\.jsonl, line 4"):
            at.prepare(at.run_spec(data, pods))


def test_an_object_that_breaks_off_is_behind_the_records_before(at: Workshop) -> None:
    """The fault of a record of a broken array is raised, not that of the array."""
    broken = b'[{"prompt": "a", "completion": "b"}, 7, {"prompt": "c", "completion": "d"}'
    uri = at.put("p/0.json", broken)
    with pytest.raises(DataError, match="record 2"):
        at.prepare(at.run_spec({"train": [{"source": uri}]}, 1))
    quality = {"faultyRecords": "Drop"}
    with pytest.raises(DataError) as caught:
        at.prepare(at.run_spec({"train": [{"source": uri}], "quality": quality}, 1))
    assert caught.value.reason == "MalformedObject"


def test_nobody_goes_on_behind_a_fault(at: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped = watch(monkeypatch)
    run_spec = at.run_spec(faulty(at), 2)
    at.work(run_spec, "Map", 1)
    assert mapped == [1], "its splits are 1, with the fault, and 3"
    at.work(run_spec, "Map", 0)
    assert mapped == [1, 0], "splits 2 and 4 cannot hold the first fault"
    with pytest.raises(DataError, match="line 41"):
        at.work(run_spec, "Reduce")
    assert mapped == [1, 0]


def test_faulty_records_are_shown_with_their_lines(at: Workshop) -> None:
    data = {**faulty(at), "quality": {"faultyRecords": "Drop"}}
    summary = at.prepare(at.run_spec(data, 3))
    report = json.loads(at.store.get(f"{summary.uri}/report.json"))
    (source,) = report["sources"]
    assert source["records"] == 115 and summary.dropped == {"MalformedRecord": 2}
    shown = [f["message"].split(", column")[0] for f in source["faults"]]
    assert shown == [f"{at.root}/f/0.jsonl, line {number}" for number in (41, 91)]


def test_data_that_changes_between_map_and_reduce_is_refused(at: Workshop) -> None:
    data = {"train": [{"source": f"{at.root}/g/"}]}
    at.put("g/0.jsonl", lines(*pairs(60)))
    run_spec = at.run_spec(data, 2)
    for worker in range(2):
        at.work(run_spec, "Map", worker)
    at.put("g/1.jsonl", lines(*pairs(60, 60)))
    with pytest.raises(DataError, match=r"/g/: .*rerunToken") as caught:
        at.work(run_spec, "Reduce")
    assert caught.value.reason == "ObjectChanged"


def behind_all(change: Callable[[], object]) -> Say:
    """Lets all be read, then makes the change."""

    def say(reading: Reading) -> None:
        if reading.bytes == reading.total_bytes:
            change()

    return say


def rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(lines(*pairs(60, 20)))


def rename(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(lines(*pairs(60, 20)))
    other.replace(path)


def add(path: Path) -> None:
    path.with_name("1.jsonl").write_bytes(lines(*pairs(3, 200)))


@pytest.mark.parametrize(
    ("change", "workers"),
    [(add, 2), *itertools.product((rewrite, rename, Path.unlink), (1, 2))],
)
def test_files_that_change_behind_their_last_record_are_refused(
    at: Workshop, workers: int, change: Callable[[Path], None], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv(ENV_PVC_ROOT, str(tmp_path / "claims"))
    path = tmp_path / "claims" / "notes" / "data" / "0.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(lines(*pairs(60, 10)))
    os.utime(path, (10**9, 10**9))
    run_spec = at.run_spec({"train": [{"source": "pvc://notes/data/"}]}, workers)
    with pytest.raises(DataError, match=r"pvc://notes/data/[01]\.jsonl: .*rerunToken") as caught:
        at.prepare(run_spec, say=behind_all(lambda: change(path)))
    assert caught.value.reason == "ObjectChanged"
    assert not [o.uri for o in at.store.list(f"{at.root}/out/") if o.uri.endswith("manifest.json")]


def test_what_one_worker_did_not_list_takes_no_part(at: Workshop) -> None:
    uri = at.put("g/0.jsonl", lines(*pairs(60)))
    run_spec = at.run_spec({"train": [{"source": uri.removesuffix("0.jsonl")}]}, 1)
    at.prepare(run_spec, say=behind_all(lambda: at.put("g/1.jsonl", lines(*pairs(3, 200)))))
    assert at.results_left(run_spec) == []


def test_an_object_that_is_replaced_behind_its_last_record_is_refused(at: Workshop) -> None:
    run_spec = at.run_spec({"train": [{"source": at.put("k/0.jsonl", lines(*pairs(60)))}]}, 1)
    with pytest.raises(DataError, match=r"k/0\.jsonl: .*rerunToken") as caught:
        at.prepare(run_spec, say=behind_all(lambda: at.put("k/0.jsonl", lines(*pairs(60, 1)))))
    assert caught.value.reason == "ObjectChanged"


# --- going on ------------------------------------------------------------------------------------


def watch(monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> list[int]:
    """Numbers of the input splits that are mapped; one of them fails for its storage, once."""
    mapped: list[int] = []
    reading = Reader.read

    def spied(self: Reader, split: InputSplit) -> Iterator[Batch]:
        if split.number == fail_at and fail_at not in mapped:
            mapped.append(split.number)
            raise StorageUnavailable("StorageUnreachable", "gone")
        mapped.append(split.number)
        return reading(self, split)

    monkeypatch.setattr(Reader, "read", spied)
    return mapped


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_is_started_again_goes_on(
    at: Workshop, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"train": [{"source": at.put("h/0.jsonl", lines(*pairs(115)))}]}
    expected = at.files(f"{at.prepare(at.run_spec(data, 3)).uri}/")
    at.clear()
    mapped = watch(monkeypatch, fail_at=3)
    run_spec = at.run_spec(data, workers)
    with pytest.raises(StorageUnavailable):
        at.prepare(run_spec)
    summary = at.prepare(run_spec)
    assert sorted(mapped) == [0, 1, 2, 3, 3, 4], "split 3 twice, all others once"
    assert at.files(f"{summary.uri}/") == expected


def test_an_array_is_one_split(at: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = at.put("l/0.json", json.dumps(pairs(115)).encode())
    mapped = watch(monkeypatch)
    summary = at.prepare(at.run_spec({"train": [{"source": uri}]}, 2))
    assert mapped == [0] and summary.train_samples > 100


def test_a_split_whose_shards_are_gone_is_mapped_again(
    at: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"train": [{"source": at.put("i/0.jsonl", lines(*pairs(115)))}]}
    run_spec = at.run_spec(data, 2)
    at.work(run_spec, "Map", 1)
    gone = next(o.uri for o in at.store.list(f"{at.root}/out/") if "-00003-" in o.uri)
    at.store.delete([gone])
    mapped = watch(monkeypatch)
    at.prepare(run_spec)
    assert mapped == [3, 0, 2, 4]


# --- cutting and dealing -------------------------------------------------------------------------


@given(st.lists(st.sampled_from([b"", b"a", b"abc", b"\xef\xbb\xbf"]), max_size=12), st.booleans(),
       st.lists(st.integers(0, 60), max_size=4))  # fmt: skip
def test_ranges_hold_every_line_once(body: list[bytes], ended: bool, cuts: list[int]) -> None:
    data = b"\n".join(body) + (b"\n" if ended else b"")
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    found: list[bytes] = []
    for start, end in itertools.pairwise(edges):
        part = list(lines_between(io.BytesIO(data), start, end))
        assert count_lines(io.BytesIO(data), start, end) == len(part)
        found += part
    expected = data.splitlines(keepends=True) if data else []
    if expected:
        expected[0] = expected[0].removeprefix(b"\xef\xbb\xbf")
    assert found == expected


def split_of(number: int, size: int) -> InputSplit:
    return InputSplit(number, 0, (ByteRange(DataObject("s3://b/x", size, "", Path()), 0, size),))


@given(st.lists(st.integers(0, 2000), max_size=40), st.integers(1, 8))
def test_splits_are_dealt_once_and_evenly(sizes: list[int], workers: int) -> None:
    made = [split_of(i, size) for i, size in enumerate(sizes)]
    hands = deal(made, workers)
    assert len(hands) == workers
    assert sorted(p.number for hand in hands for p in hand) == list(range(len(sizes)))
    assert all(hand == sorted(hand, key=lambda p: p.number) for hand in hands)
    loads = [sum(p.bytes for p in hand) for hand in hands]
    assert max(loads) - min(loads) <= max(sizes, default=0)


def test_equal_splits_are_dealt_in_turn() -> None:
    hands = deal([split_of(i, 64) for i in range(7)], 3)
    assert [[p.number for p in hand] for hand in hands] == [[0, 3, 6], [1, 4], [2, 5]]
