"""Map and reduce: the same bytes for any number of pods and processes, the first fault of the data,
and objects that change."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from finetune_api.names import ENV_PVC_ROOT
from finetune_trainer.failures import DataError
from finetune_trainer.prepare.mapping import map as map_module
from finetune_trainer.prepare.mapping.progress import ProgressCallback, ReadProgress
from finetune_trainer.prepare.reading import inputsplits
from finetune_trainer.prepare.reducing import reduce as reduce_module
from trainer.map_reduce_helpers import ALL_DROP, PrepareJob, put_mixed_data, spy_on_reads
from trainer.prepare_helpers import lines, pairs
from variants import beyond

pytestmark = pytest.mark.slow

# --- output --------------------------------------------------------------------------------------


RUNS: Final = [
    (((1, 1), (1, 3), (2, 1), (4, 1)), 1, ALL_DROP),
    (((1, 1), (3, 2)), 2, {}),
    (((1, 1), (1, 2), (4, 1)), 3, {"deduplicate": False, "contamination": "Drop"}),
]


@pytest.mark.parametrize(
    ("runs", "seed", "quality", "validation"),
    beyond(
        [(*run, validation) for run in RUNS for validation in ("0.2", "0")],
        lambda _, seed, __, validation: (seed, validation) in ((1, "0.2"), (3, "0")),
    ),
)
def test_any_number_of_pods_and_processes_writes_the_same_bytes(
    job: PrepareJob, runs: tuple[tuple[int, int], ...], seed: int, quality: dict[str, Any],
    validation: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    data = put_mixed_data(job, seed, **quality)
    data["split"] = {"validation": validation}
    short = {"training": {"maxLength": 128}}
    written, summaries = [], []
    for pods, processes in runs:
        run_spec = job.run_spec(data, pods, **short)
        summaries.append(job.prepare(run_spec, processes))
        written.append(job.files(f"{summaries[-1].uri}/"))
        assert job.results_left(run_spec) == []
        last = job.samples(summaries[-1])
        job.clear()
    assert all(files == written[0] for files in written[1:])
    assert all(summary == summaries[0] for summary in summaries[1:])
    assert len(last["train"]) > 20 and last["test"]
    assert bool(last["validation"]) == (validation != "0")
    assert len(summaries[0].dropped) >= (6 if quality is ALL_DROP else 1)

    monkeypatch.setattr(inputsplits, "SPLIT_BYTES", 1 << 30)
    whole = job.prepare(job.run_spec(data, 1, **short))
    assert job.samples(whole) == last, "samples do not depend on the input splits"
    assert whole.dropped == summaries[0].dropped


def test_map_and_reduce_find_the_same_contamination(
    job: PrepareJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = put_mixed_data(job, 4, contamination="Drop")
    data["split"] = {"validation": "0"}
    found = []
    for in_map in (True, False):
        if not in_map:
            monkeypatch.setattr(map_module, "compared_in_map", lambda data: False)
            monkeypatch.setattr(reduce_module, "compared_in_map", lambda data: False)
        summary = job.prepare(job.run_spec(data, 1))
        report = json.loads(job.store.get(f"{summary.uri}/report.json"))
        found.append((report["contamination"], job.samples(summary), summary.dropped))
        job.clear()
    assert found[0] == found[1] and found[0][2]["Contaminated"] >= 2
    assert found[0][0]["comparedSamples"] == found[0][0]["heldOutSamples"] == 11


def test_prepared_data_is_reused(job: PrepareJob) -> None:
    run_spec = job.run_spec(put_mixed_data(job, 5), 2)
    assert not job.prepare(run_spec).reused
    assert job.run_pod(run_spec, "Map", 1) is None
    again = job.run_pod(run_spec, "Reduce")
    assert again is not None and again.reused and job.results_left(run_spec) == []


def test_a_json_array_is_one_split(job: PrepareJob, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = job.put("l/0.json", json.dumps(pairs(115)).encode())
    mapped = spy_on_reads(monkeypatch)
    summary = job.prepare(job.run_spec({"train": [{"source": uri}]}, 2))
    assert mapped == [0] and summary.train_samples > 100


# --- faults --------------------------------------------------------------------------------------


def put_faulty_data(job: PrepareJob) -> dict[str, Any]:
    """Write an object of input splits 0 to 4, with faults in splits 1 and 3; return the data
    settings."""
    rows = [json.dumps(r).encode() + b"\n" for r in pairs(115)]
    assert 4 * inputsplits.SPLIT_BYTES < sum(map(len, rows)) < 5 * inputsplits.SPLIT_BYTES
    rows[40] = b'{"prompt": "first", oops}\n'
    rows[90] = b'{"prompt": "second", oops}\n'
    return {"train": [{"source": job.put("f/0.jsonl", b"".join(rows))}]}


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_first_fault_of_the_data_is_raised_with_its_line(job: PrepareJob, workers: int) -> None:
    run_spec = job.run_spec(put_faulty_data(job), workers)
    with pytest.raises(DataError) as caught:
        job.prepare(run_spec)
    assert caught.value.reason == "MalformedRecord"
    assert f"{job.root}/f/0.jsonl, line 41, column 21" in caught.value.message
    assert job.results_left(run_spec) == []


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
def test_the_first_of_two_faults_in_a_batch_is_raised(
    job: PrepareJob, first: bytes, second: bytes
) -> None:
    """Independent of the mapping steps that find the two faults."""
    data = lines(*pairs(1)) + first + second
    quality = {"personalData": "Fail", "overlength": "Fail"}
    source = {"train": [{"source": job.put("n/0.jsonl", data)}], "quality": quality}
    with pytest.raises(DataError, match=r"n/0\.jsonl, line 2"):
        job.prepare(job.run_spec(source, 1, training={"maxLength": 64}))


def test_a_fault_of_a_held_out_set_precedes_those_of_training_sets(job: PrepareJob) -> None:
    held = job.put("o/held.jsonl", lines(*pairs(3)) + b"oops\n")
    data = {**put_faulty_data(job), "test": [{"source": held}]}
    for pods in (1, 2):
        with pytest.raises(DataError, match=r"o/held\.jsonl, line 4"):
            job.prepare(job.run_spec(data, pods))


@pytest.mark.parametrize("claim", [False, True], ids=["s3", "pvc"])
def test_a_faulty_record_precedes_the_error_of_its_truncated_object(
    job: PrepareJob, claim: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truncated = b'[{"prompt": "a", "completion": "b"}, 7, {"prompt": "c", "completion": "d"}'
    uri = job.put("p/0.json", truncated)
    if claim:
        monkeypatch.setenv(ENV_PVC_ROOT, str(tmp_path / "claims"))
        (tmp_path / "claims" / "notes").mkdir(parents=True)
        (tmp_path / "claims" / "notes" / "0.json").write_bytes(truncated)
        uri = "pvc://notes/0.json"
    with pytest.raises(DataError, match="record 2"):
        job.prepare(job.run_spec({"train": [{"source": uri}]}, 1))
    quality = {"faultyRecords": "Drop"}
    with pytest.raises(DataError) as caught:
        job.prepare(job.run_spec({"train": [{"source": uri}], "quality": quality}, 1))
    assert caught.value.reason == "MalformedObject"


def test_no_pod_maps_a_split_after_a_failed_split(
    job: PrepareJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped = spy_on_reads(monkeypatch)
    run_spec = job.run_spec(put_faulty_data(job), 2)
    job.run_pod(run_spec, "Map", 1)
    assert mapped == [1], "worker 1 has splits 1, with the fault, and 3"
    job.run_pod(run_spec, "Map", 0)
    assert mapped == [1, 0], "splits 2 and 4 cannot contain the first fault"
    with pytest.raises(DataError, match="line 41"):
        job.run_pod(run_spec, "Reduce")
    assert mapped == [1, 0]


def test_faulty_records_are_reported_with_their_lines(job: PrepareJob) -> None:
    data = {**put_faulty_data(job), "quality": {"faultyRecords": "Drop"}}
    summary = job.prepare(job.run_spec(data, 3))
    report = json.loads(job.store.get(f"{summary.uri}/report.json"))
    (source,) = report["sources"]
    assert source["records"] == 115 and summary.dropped == {"MalformedRecord": 2}
    shown = [f["message"].split(", column")[0] for f in source["faults"]]
    assert shown == [f"{job.root}/f/0.jsonl, line {number}" for number in (41, 91)]


# --- objects that change -------------------------------------------------------------------------


def test_data_that_changes_between_map_and_reduce_is_refused(job: PrepareJob) -> None:
    data = {"train": [{"source": f"{job.root}/g/"}]}
    job.put("g/0.jsonl", lines(*pairs(60)))
    run_spec = job.run_spec(data, 2)
    for worker in range(2):
        job.run_pod(run_spec, "Map", worker)
    job.put("g/1.jsonl", lines(*pairs(60, 60)))
    with pytest.raises(DataError, match=r"/g/: .*rerunToken") as caught:
        job.run_pod(run_spec, "Reduce")
    assert caught.value.reason == "ObjectChanged"


def after_all_reads(change: Callable[[], object]) -> ProgressCallback:
    """Return a callback that makes the change once all bytes are read."""

    def callback(progress: ReadProgress) -> None:
        if progress.bytes == progress.total_bytes:
            change()

    return callback


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
def test_a_claim_that_changes_after_its_last_record_is_read_is_refused(
    job: PrepareJob, workers: int, change: Callable[[Path], None], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv(ENV_PVC_ROOT, str(tmp_path / "claims"))
    path = tmp_path / "claims" / "notes" / "data" / "0.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(lines(*pairs(60, 10)))
    os.utime(path, (10**9, 10**9))
    run_spec = job.run_spec({"train": [{"source": "pvc://notes/data/"}]}, workers)
    with pytest.raises(DataError, match=r"pvc://notes/data/[01]\.jsonl: .*rerunToken") as caught:
        job.prepare(run_spec, say=after_all_reads(lambda: change(path)))
    assert caught.value.reason == "ObjectChanged"
    written = [o.uri for o in job.store.list(f"{job.root}/out/")]
    assert not [uri for uri in written if uri.endswith("manifest.json")]


def test_a_single_worker_ignores_objects_that_are_added_after_its_listing(job: PrepareJob) -> None:
    uri = job.put("g/0.jsonl", lines(*pairs(60)))
    run_spec = job.run_spec({"train": [{"source": uri.removesuffix("0.jsonl")}]}, 1)
    job.prepare(run_spec, say=after_all_reads(lambda: job.put("g/1.jsonl", lines(*pairs(3, 200)))))
    assert job.results_left(run_spec) == []


def test_an_object_that_is_replaced_after_its_last_record_is_read_is_refused(
    job: PrepareJob,
) -> None:
    run_spec = job.run_spec({"train": [{"source": job.put("k/0.jsonl", lines(*pairs(60)))}]}, 1)
    with pytest.raises(DataError, match=r"k/0\.jsonl: .*rerunToken") as caught:
        job.prepare(
            run_spec, say=after_all_reads(lambda: job.put("k/0.jsonl", lines(*pairs(60, 1))))
        )
    assert caught.value.reason == "ObjectChanged"
