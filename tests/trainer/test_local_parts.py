"""Decisions of `finetune run`: process layout, choice of the run, choice of the storage."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune_api.cluster import Compute
from finetune_api.names import ExitCode, storage_env
from finetune_api.results import Failure, Termination
from finetune_api.run_spec import CONTRACT_VERSION, JobIdentity, RunSpec, TunedBase
from finetune_api.sources import ModelLocation
from finetune_api.spec import FineTuneJobSpec, parse_spec
from finetune_trainer.failures import UserError
from finetune_trainer.local import stages
from finetune_trainer.local.base_reference import find_tuned
from finetune_trainer.local.display import duration
from finetune_trainer.local.layout import lay_out
from finetune_trainer.local.manifest import LocalJob
from finetune_trainer.local.state import JobState, StateFolder, changed, choose_run
from finetune_trainer.local.storage import Where, storage_for, uses_embedded
from finetune_trainer.threads import thread_environment


@pytest.mark.parametrize(
    ("compute", "gpus", "cores", "nodes", "processes", "dealt", "threads", "noted"),
    [
        ({"nodes": 2, "gpusPerNode": 0}, 0, 4, 2, 1, ((), ()), 2, False),
        ({"nodes": 2, "gpusPerNode": 0, "processesPerNode": 2}, 8, 4, 2, 2, ((), ()), 1, False),
        ({"nodes": 1, "gpusPerNode": 0}, 0, 1, 1, 1, ((),), 1, False),
        ({"nodes": 4, "gpusPerNode": 8}, 0, 2, 2, 1, ((), ()), 1, True),
        ({"nodes": 2, "gpusPerNode": 2}, 4, 16, 2, 2, ((0, 1), (2, 3)), 4, False),
        ({"nodes": 2, "gpusPerNode": 8}, 4, 16, 2, 2, ((0, 1), (2, 3)), 4, True),
        ({"nodes": 4, "gpusPerNode": 8}, 2, 16, 1, 2, ((0, 1),), 8, True),
        ({"nodes": 1, "gpusPerNode": 2, "processesPerNode": 1}, 2, 4, 1, 1, ((0, 1),), 4, False),
    ],
)
def test_layout(
    compute: dict[str, Any], gpus: int, cores: int, nodes: int, processes: int,
    dealt: tuple[tuple[int, ...], ...], threads: int, noted: bool,
) -> None:  # fmt: skip
    found = lay_out(Compute.model_validate(compute), gpus, cores)
    assert (found.nodes, found.processes, found.gpus) == (nodes, processes, dealt)
    share = found.nodes * found.processes
    assert thread_environment({}, share, cores)["OMP_NUM_THREADS"] == str(threads)
    assert bool(found.notes) == noted


def test_context_parallel_is_limited_to_the_local_processes() -> None:
    compute = Compute.model_validate({"nodes": 1, "gpusPerNode": 4, "contextParallel": 4})
    assert lay_out(compute, 4, 8).context_parallel == 4
    smaller, none = lay_out(compute, 2, 8), lay_out(compute, 0, 8)
    assert (smaller.processes, smaller.context_parallel) == (2, 2)
    assert (none.processes, none.context_parallel) == (1, 1)
    assert "compute.contextParallel is 4" in none.notes[-1]


def job(**changes: Any) -> LocalJob:
    return LocalJob("job", "default", spec(**changes), {})


def spec(**changes: Any) -> FineTuneJobSpec:
    return parse_spec(
        {
            "model": {"source": "s3://bucket/model"},
            "data": {"train": [{"source": "s3://bucket/train.jsonl"}]},
            "output": {"destination": "s3://bucket/out"},
        }
        | changes
    )


def test_an_interrupted_run_resumes_and_a_complete_run_does_not() -> None:
    state, first, goes_on = choose_run(JobState(uid="0f9c2e7a"), job())
    assert (first, goes_on) == ("1-0f9c2", False)
    state, again, goes_on = choose_run(state, job())
    assert (again, goes_on) == (first, True)
    state, resized, goes_on = choose_run(state, job(compute={"nodes": 4}))
    assert (resized, goes_on) == (first, True)
    state, second, goes_on = choose_run(changed(state, complete=True), job(compute={"nodes": 4}))
    assert (second, goes_on) == ("2-0f9c2", False)
    state, third, goes_on = choose_run(state, job(training={"epochs": 7}))
    assert (third, goes_on) == ("3-0f9c2", False)
    state, fourth, goes_on = choose_run(state, job(training={"epochs": 7}, rerunToken="again"))
    assert (fourth, goes_on) == ("4-0f9c2", False)


def test_the_uid_of_a_job_is_stored_under_its_name(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path)
    state, _, _ = choose_run(folder.read("job"), job())
    folder.write("job", state)
    assert folder.read("job") == state
    assert folder.read("other").uid != state.uid


@pytest.mark.parametrize(
    ("endpoint", "of_spec", "environ", "expected"),
    [
        (None, None, {}, True),
        (None, None, {"AWS_ACCESS_KEY_ID": "a"}, False),
        (None, None, {"AWS_PROFILE": "work"}, False),
        ("http://s3:9000", None, {}, False),
        (None, "http://s3:9000", {}, False),
    ],
)
def test_the_embedded_server_is_used_when_nothing_names_other_storage(
    endpoint: str | None, of_spec: str | None, environ: dict[str, str], expected: bool
) -> None:
    storage = {"endpoint": of_spec} if of_spec else {}
    assert uses_embedded(spec(storage=storage), endpoint, environ) is expected


def test_a_cluster_manifest_runs_on_the_embedded_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "mine")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "own")
    cluster = spec(
        storage={"endpoint": "http://s3:9000", "secretRef": {"name": "keys"}},
        output={"destination": "s3://made-here/out"},
        model={"source": "s3://far/model", "storage": {"region": "eu-west-1"}},
    )
    with storage_for(cluster, StateFolder(tmp_path), None, force_embedded=True) as where:
        assert where.embedded is not None
        assert where.spec.storage.endpoint == where.embedded.endpoint
        assert where.spec.storage.secret_ref is None
        where.embedded.store().put("s3://made-here/probe", b"1")
        run_spec = RunSpec(
            version=CONTRACT_VERSION,
            job=JobIdentity(namespace="default", name="job", uid="0f9c2"),
            run="1-0f9c2",
            spec=where.spec,
        )
        keys = where.environment(run_spec)
    assert keys[storage_env(0, "AWS_ACCESS_KEY_ID")] == where.embedded.access_key
    assert keys[storage_env(1, "AWS_ACCESS_KEY_ID")] == "mine"


class Scripted(stages.StageProcess):
    """A stage process with scripted exit codes: one per start, the last one repeated."""

    def __init__(self, paths: stages.StagePaths, rank: int, codes: list[int]) -> None:
        super().__init__(paths, "train", rank, {})
        self.codes = codes
        self.starts = 0

    def start(self) -> None:
        self._termination.parent.mkdir(parents=True, exist_ok=True)
        code = self.codes[min(self.starts, len(self.codes) - 1)]
        self.starts += 1
        self._process = subprocess.Popen([sys.executable, "-S", "-c", f"raise SystemExit({code})"])


@pytest.fixture
def paths(tmp_path: Path) -> stages.StagePaths:
    return stages.StagePaths(tmp_path, tmp_path / "claims", {}, 2)


def to_end(stage: stages.Stage) -> None:
    stage.start()
    while not stage.step():
        for process in stage.processes:
            process.wait()


def test_a_lost_node_is_restarted(paths: stages.StagePaths) -> None:
    lost, other = Scripted(paths, 0, [20, 20, 0]), Scripted(paths, 1, [0])
    stage = stages.Stage([lost, other], max_restarts=2)
    to_end(stage)
    assert stage.failed() is None
    assert (lost.starts, other.starts, stage.restarts) == (3, 1, 2)


def test_restarts_are_bounded_and_final_failures_are_not_retried(
    paths: stages.StagePaths,
) -> None:
    lost = Scripted(paths, 0, [20])
    stage = stages.Stage([lost], max_restarts=1)
    to_end(stage)
    assert lost.starts == 2
    assert stage.failed() is not None
    final = Scripted(paths, 0, [int(ExitCode.DIVERGED)])
    to_end(stages.Stage([final], max_restarts=5))
    assert final.starts == 1


def test_the_root_cause_is_the_reported_failure(paths: stages.StagePaths) -> None:
    cause, victim = Scripted(paths, 1, [13]), Scripted(paths, 0, [23])
    stage = stages.Stage([victim, cause], max_restarts=0)
    to_end(stage)
    for process, kind in ((cause, "Diverged"), (victim, "Preempted")):
        failure = Failure.model_validate(
            {"class": kind, "reason": kind, "message": kind, "retryable": kind == "Preempted"}
        )
        process._termination.write_text(
            Termination(run="1-0f9c2", role="train", failure=failure).to_text()
        )
    found = stage.failed()
    assert found is not None
    assert found[1].failure_class == "Diverged"


def test_a_missing_termination_message_is_reported(paths: stages.StagePaths) -> None:
    silent = Scripted(paths, 0, [0])
    silent._process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    silent._process.send_signal(signal.SIGKILL)
    silent.wait()
    failure = silent.failure()
    assert failure.reason == "NoTerminationMessage"
    assert "SIGKILL" in failure.message
    assert str(silent.log) in failure.message


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.6, "1m00s"), (130, "2m10s"), (3725, "1h02m")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def ended(folder: StateFolder, name: str, **changes: Any) -> JobState:
    """Store and return a job's state after a run that published to the embedded storage."""
    state, _, _ = choose_run(folder.read(name), LocalJob(name, "default", spec(), {}))
    state = changed(state, **{"complete": True, "digest": "sha", "embedded": True} | changes)
    folder.write(name, state)
    return state


def where(embedded: bool, endpoint: str, **changes: Any) -> Where:
    server: Any = object() if embedded else None
    model = {"fineTuneJobRef": {"name": "first"}}
    return Where(spec(model=model, storage={"endpoint": endpoint}, **changes), {}, server)


def test_a_job_reference_resolves_to_the_last_run_in_the_state_folder(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path)
    here = where(True, "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"it never ran .*; first: finetune run MANIFEST of first"):
        find_tuned(folder, "default", here)
    assert not (tmp_path / "jobs").exists()
    state = ended(folder, "first")
    run = f"1-{state.uid[:5]}"
    base = find_tuned(folder, "default", here)
    beneath = ModelLocation(source="s3://bucket/model")
    uri = f"s3://bucket/out/{run}"
    assert base == TunedBase(job="first", run=run, uri=uri, digest="sha", beneath=beneath)
    with pytest.raises(UserError, match="add --local-storage"):
        find_tuned(folder, "default", where(False, "http://s3:9000"))
    ended(folder, "first", complete=False)
    with pytest.raises(UserError, match=r"its run 2-.* has not ended"):
        find_tuned(folder, "default", here)


def test_a_model_published_to_a_server_is_read_from_that_server(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path)
    ended(folder, "first", embedded=False, endpoint="http://s3:9000")
    near = find_tuned(folder, "default", where(False, "http://s3:9000"))
    far = find_tuned(folder, "default", where(True, "http://127.0.0.1:9"))
    assert near is not None and near.storage is None
    assert far is not None and far.storage is not None and far.beneath is not None
    assert far.storage.endpoint == "http://s3:9000"
    assert far.beneath.storage == far.storage
