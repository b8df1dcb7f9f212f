"""Failed pods of map and reduce: a restarted pod repeats only unfinished input splits, and the
prepared data is the same."""

from __future__ import annotations

import multiprocessing
import os
import signal
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_trainer.failures import HostOutOfMemory, NodeFailure, StorageUnavailable, TrainerError
from finetune_trainer.prepare.mapping import pool
from finetune_trainer.prepare.mapping.progress import ProgressCallback, ReadProgress
from trainer.map_reduce_helpers import ALL_DROP, PrepareJob, put_mixed_data, spy_on_reads
from trainer.prepare_helpers import lines, pairs

pytestmark = pytest.mark.slow


@given(data=st.data())
@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_failed_and_restarted_pods_write_the_same_bytes_in_any_order(
    job: PrepareJob, data: st.DataObject
) -> None:
    """Pods fail at random batches before each pod completes."""
    mixed = put_mixed_data(job, 6, **ALL_DROP)
    expected = job.files(f"{job.prepare(job.run_spec(mixed, 1)).uri}/")
    job.clear()
    pods = data.draw(st.integers(2, 3))
    run_spec = job.run_spec(mixed, pods)
    ends = data.draw(st.lists(st.tuples(st.integers(0, pods - 1), st.integers(1, 6)), max_size=4))
    for pod, batches in ends:
        with suppress(StorageUnavailable):
            job.run_pod(run_spec, "Map", pod, fail_after(batches))
    for pod in data.draw(st.permutations(range(pods))):
        job.run_pod(run_spec, "Map", pod)
    summary = job.run_pod(run_spec, "Reduce")
    assert summary is not None
    assert job.files(f"{summary.uri}/") == expected
    job.clear()


def fail_after(batches: int) -> ProgressCallback:
    """Return a callback that raises StorageUnavailable after this many batches."""
    left = iter(range(batches))

    def callback(progress: ReadProgress) -> None:
        if next(left, None) is None:
            raise StorageUnavailable("StorageUnreachable", "gone")

    return callback


def kill_one_process(progress: ReadProgress) -> None:
    """Kill a process of the pool, as the kernel's OOM killer does."""
    found = [p for p in multiprocessing.active_children() if p.pid is not None]
    os.kill(found[0].pid or 0, signal.SIGKILL)


@pytest.mark.parametrize(
    ("kills", "kind", "reason"),
    [(1, HostOutOfMemory, "HostOutOfMemory"), (0, NodeFailure, "ProcessLost")],
)
def test_a_killed_process_raises_a_named_failure_and_the_next_attempt_succeeds(
    job: PrepareJob, kills: int, kind: type[TrainerError], reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    data = {"train": [{"source": job.put("m/0.jsonl", lines(*pairs(300)))}]}
    run_spec = job.run_spec(data, 1)
    counts = iter([0, kills])
    with monkeypatch.context() as patch, pytest.raises(kind) as caught:
        patch.setattr(pool, "count_oom_kills", lambda: next(counts))
        job.run_pod(run_spec, "All", 0, kill_one_process, processes=2)
    assert isinstance(caught.value, TrainerError) and caught.value.reason == reason
    assert job.prepare(run_spec).train_samples > 200


@pytest.mark.parametrize("workers", [1, 2])
def test_a_restarted_pod_maps_only_unfinished_splits(
    job: PrepareJob, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"train": [{"source": job.put("h/0.jsonl", lines(*pairs(115)))}]}
    expected = job.files(f"{job.prepare(job.run_spec(data, 3)).uri}/")
    job.clear()
    mapped = spy_on_reads(monkeypatch, fail_at=3)
    run_spec = job.run_spec(data, workers)
    with pytest.raises(StorageUnavailable):
        job.prepare(run_spec)
    summary = job.prepare(run_spec)
    assert sorted(mapped) == [0, 1, 2, 3, 3, 4], "split 3 twice, all others once"
    assert job.files(f"{summary.uri}/") == expected


def test_a_split_with_a_deleted_shard_is_mapped_again(
    job: PrepareJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"train": [{"source": job.put("i/0.jsonl", lines(*pairs(115)))}]}
    run_spec = job.run_spec(data, 2)
    job.run_pod(run_spec, "Map", 1)
    shard = next(o.uri for o in job.store.list(f"{job.root}/out/") if "-00003-" in o.uri)
    job.store.delete([shard])
    mapped = spy_on_reads(monkeypatch)
    job.prepare(run_spec)
    assert mapped == [3, 0, 2, 4]
