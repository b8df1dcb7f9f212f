"""The control plane without nodes: a complete API on loopback, and its clean-up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster import kwok, state
from cluster.api import Api, eventually
from cluster.control_plane import ControlPlane
from cluster.processes import Process, Processes

PROCESSES = {"etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler"}


def indexed_job(name: str, annotations: dict[str, str] | None = None) -> dict[str, Any]:
    container = {"name": "main", "image": "local/none:1"}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "completionMode": "Indexed",
            "completions": 2,
            "parallelism": 2,
            "backoffLimit": 0,
            "template": {
                "metadata": {"annotations": annotations or {}},
                "spec": {"restartPolicy": "Never", "containers": [container]},
            },
        },
    }


def pods_of(api: Api, job: str) -> list[Any]:
    pods: list[Any] = api.get("pods", "-n", "default", "-l", f"job-name={job}")["items"]
    return pods


def two_pods_of(api: Api, job: str) -> list[Any]:
    return eventually("two pods", lambda: (len(p := pods_of(api, job)) == 2 and p) or None)


def test_deleting_a_job_deletes_its_pods(control_plane: Api) -> None:
    control_plane.apply(indexed_job("plain"))
    pods = two_pods_of(control_plane, "plain")
    index = "batch.kubernetes.io/job-completion-index"
    assert {pod["metadata"]["annotations"][index] for pod in pods} == {"0", "1"}
    assert {pod["status"]["phase"] for pod in pods} == {"Pending"}
    control_plane.kubectl("delete", "job", "plain", "-n", "default", "--wait=false")
    eventually("the pods are gone", lambda: not pods_of(control_plane, "plain"))


def test_rbac_is_enforced(control_plane: ControlPlane) -> None:
    nobody = Api(control_plane.kubeconfig_of("nobody", "nobody"))
    with pytest.raises(RuntimeError, match="forbidden"):
        nobody.kubectl("get", "secrets", "-n", "kube-system")


@pytest.fixture(scope="module")
def plane_with_nodes() -> Any:
    with ControlPlane(kwok_nodes=2) as plane:
        yield plane


def test_kwok_ends_pods_by_their_annotations(plane_with_nodes: ControlPlane) -> None:
    plane_with_nodes.apply(
        indexed_job("good", {kwok.EXIT_CODE: "0"}),
        indexed_job("bad", {kwok.EXIT_CODE: "3", kwok.MESSAGE: "out of milk"}),
        indexed_job("endless"),
    )

    def ended(job: str, condition: str) -> bool:
        status = plane_with_nodes.get("job", job, "-n", "default")["status"]
        return condition in {each["type"] for each in status.get("conditions", [])}

    eventually("the good job completes", lambda: ended("good", "Complete"))
    eventually("the bad job fails", lambda: ended("bad", "Failed"))
    container = pods_of(plane_with_nodes, "bad")[0]["status"]["containerStatuses"][0]
    assert container["state"]["terminated"]["exitCode"] == 3
    assert container["state"]["terminated"]["message"] == "out of milk"
    phases = [pod["status"]["phase"] for pod in pods_of(plane_with_nodes, "endless")]
    assert phases == ["Running", "Running"]


def test_stop_ends_all_processes_and_removes_the_folder() -> None:
    plane = ControlPlane()
    with plane:
        assert set(plane.processes.names()) == PROCESSES
        ours = [plane.processes.require(name) for name in PROCESSES]
    assert not any(process.alive for process in ours)
    assert not plane.folder.exists()


START_AND_HANG = """
import time
from cluster.control_plane import ControlPlane
plane = ControlPlane()
plane.start()
print(plane.folder, flush=True)
time.sleep(600)
"""


def test_the_next_run_cleans_up_after_a_killed_one() -> None:
    killed = subprocess.Popen(
        [sys.executable, "-c", START_AND_HANG],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert killed.stdout is not None
    folder = Path(killed.stdout.readline().strip())
    orphans = Processes(folder / "processes")
    left = [orphans.require(name) for name in PROCESSES]
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert all(process.alive for process in left)
    with ControlPlane() as plane:
        assert plane.kubectl("get", "nodes") == ""
        assert not any(process.alive for process in left)
        assert not folder.exists()


def test_a_process_with_another_start_time_is_not_stopped(tmp_path: Path) -> None:
    processes = Processes(tmp_path)
    process = processes.start("sleep", ["sleep", "60"])
    record = tmp_path / "sleep.pid"
    stat = record.read_text()
    record.write_text(stat.replace(str(process.started), str(process.started - 1)))
    processes.stop("sleep")
    assert process.alive, "a process that only has the same id was stopped"
    record.write_text(stat)
    processes.stop("sleep")
    assert Process.of(process.pid) is None


def test_a_claimed_name_is_busy_until_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = state.claim("one")
    with pytest.raises(state.Busy, match=str(os.getpid())):
        state.claim("one")
    state.release(folder)
    state.release(state.claim("one"))
