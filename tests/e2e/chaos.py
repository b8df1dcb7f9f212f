"""Disturbances of a run on the real cluster: what is done, when, and what the status must say.

Each is a function of a ``Place``: the platform, the job and the rank to hit. It returns once the
disturbance is over, the repair by hand included where a person would repair (a node that is plugged
in again). A row of ``SCENARIOS`` has the rest.
"""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from e2e_platform import SYSTEM, TEAM, Platform

from cluster.api import eventually
from cluster.processes import Process
from cluster.real import RealCluster

INDEX = "batch.kubernetes.io/job-completion-index"


@dataclass
class Place:
    """Where a disturbance hits."""

    platform: Platform
    cluster: RealCluster
    name: str
    """Name of the job."""
    after: ExitStack = field(default_factory=ExitStack)
    """Repairs once the run has ended."""

    def pod(self, rank: int, role: str = "train") -> dict[str, Any]:
        """The running pod of a rank."""

        def look() -> dict[str, Any] | None:
            for pod in self.platform.pods(self.name, role):
                index = pod["metadata"]["labels"].get(INDEX, "0")
                alive = "deletionTimestamp" not in pod["metadata"]
                if index == str(rank) and pod["status"].get("phase") == "Running" and alive:
                    return dict(pod)
            return None

        return eventually(f"{role} {rank} runs", look, within=180)

    def node(self, rank: int) -> str:
        return str(self.pod(rank)["spec"]["nodeName"])

    def processes(self, rank: int, words: str) -> list[Process]:
        """Processes of a rank's pod, as the host sees them, by words of their command line."""
        return processes_of(self.pod(rank)["metadata"]["uid"], words)

    def edit(self, **spec: Any) -> None:
        text = json.dumps({"spec": spec})
        self.platform.kubectl("patch", "finetunejob", self.name, "--type=merge", "-p", text)

    def phase(self, *phases: str) -> None:
        eventually(
            f"{self.name} is {' or '.join(phases)}",
            lambda: self.platform.status(self.name).get("phase") in phases,
            within=240,
        )


def processes_of(pod_uid: str, words: str) -> list[Process]:
    """Processes in the cgroups of a pod whose name and command line match ``words``, oldest
    first."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            cgroups = (entry / "cgroup").read_text()
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            command = f"{(entry / 'comm').read_text().strip()} {command}"
        except (OSError, UnicodeDecodeError):
            continue
        process = Process.of(int(entry.name))
        if pod_uid in cgroups and re.search(words, command) and process is not None:
            found.append(process)
    return sorted(found, key=lambda p: p.started)


WORKER = r"^rank-\d+ "
"""Training processes: ``fork_server.begin_process`` names them."""


# --- processes and pods --------------------------------------------------------------------------


def worker_killed(place: Place) -> None:
    place.processes(1, WORKER)[-1].signal(signal.SIGKILL)


def rank_stopped(place: Place) -> None:
    """For good: only the stall watch ends it."""
    place.processes(1, WORKER)[-1].signal(signal.SIGSTOP)


TAKE_MEMORY = """
import os, time
parent, taken = os.getpid(), []
while True:
    if os.fork() == 0:
        taken.append(bytearray(b"1" * 2**26))
        while os.getppid() == parent: time.sleep(0.1)
        os._exit(0)
    time.sleep(0.1)
"""


def out_of_memory(place: Place) -> None:
    """The kernel kills the training process: other processes of the pod, each smaller than it, take
    all of the pod's memory."""
    pod = place.pod(1)["metadata"]["name"]
    worker = place.processes(1, WORKER)[-1]
    Path(f"/proc/{worker.pid}/oom_score_adj").write_text("1000")

    def take() -> None:
        with suppress(RuntimeError):  # killed below
            place.platform.kubectl("exec", pod, "-c", "trainer", "--", "python3", "-c", TAKE_MEMORY)

    taking = threading.Thread(target=take, daemon=True)
    taking.start()
    taker, *_ = eventually(
        "memory is taken", lambda: place.processes(1, r"(?s)^python3 .*bytearray"), within=30
    )
    try:
        until = time.monotonic() + 60
        while worker.alive and time.monotonic() < until:
            time.sleep(0.005)
        assert not worker.alive, "the kernel has not killed the worker"
    finally:
        taker.signal(signal.SIGKILL)  # the others end with it
        taking.join(30)


def rank_0_deleted(place: Place) -> None:
    pod = place.pod(0)["metadata"]["name"]
    place.platform.kubectl("delete", "pod", pod, "--grace-period=0", "--force")


def evicted(place: Place) -> None:
    pod = place.pod(1)["metadata"]["name"]
    body = {"apiVersion": "policy/v1", "kind": "Eviction"}
    text = json.dumps(body | {"metadata": {"name": pod, "namespace": TEAM}})
    path = f"/api/v1/namespaces/{TEAM}/pods/{pod}/eviction"
    place.platform.kubectl("create", "--raw", path, "-f", "-", stdin=text)


def disk_full(place: Place) -> None:
    """The pod's writable folder has no space left: the kubelet evicts the pod, a minute later."""
    full = place.pod(1)["metadata"]
    pod = full["name"]
    fill = "head -c 20G /dev/zero > $FINETUNE_SCRATCH/full || true"
    with suppress(RuntimeError):  # the pod may be evicted meanwhile
        place.platform.kubectl("exec", pod, "-c", "trainer", "--", "sh", "-c", fill)
    eventually(
        "the pod is evicted", lambda: place.pod(1)["metadata"]["uid"] != full["uid"], within=240
    )


# --- nodes ---------------------------------------------------------------------------------------


def kubelet_stopped(place: Place) -> None:
    """For good: its pods run on, and nobody reports them."""
    node = place.cluster.nodes[place.node(0)]
    node.freeze_kubelet()
    place.after.callback(place.cluster.wait_for_nodes, node.name)
    place.after.callback(node.thaw_kubelet)


def node_deleted(place: Place) -> None:
    """The machine is off, and its Node object is deleted."""
    name = _away_from_storage(place)
    node = place.cluster.nodes[name]
    node.power_off()
    place.cluster.kubectl("delete", "node", name)
    place.after.callback(place.cluster.wait_for_nodes, name)
    place.after.callback(node.start)


def drained(place: Place) -> None:
    name = _away_from_storage(place)
    place.cluster.kubectl(
        "drain", name, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=150s", "--force"
    )
    place.cluster.kubectl("uncordon", name)


def network_cut(place: Place) -> None:
    """A node loses its network for half a minute."""
    name = _away_from_storage(place)
    node = place.cluster.nodes[name]
    place.cluster.network.cut(node.place)
    try:
        time.sleep(30)
    finally:
        place.cluster.network.restore(node.place)


def _away_from_storage(place: Place, ranks: tuple[int, ...] = (1, 0)) -> str:
    """The node of the first of the ranks that is not on the node of S3."""
    storage = place.cluster.get("pod", "s3", "-n", "storage")["spec"]["nodeName"]
    nodes = [place.node(rank) for rank in ranks]
    return next((node for node in nodes if node != storage), nodes[0])


def elastic_gang_shrinks_and_grows(place: Place) -> None:
    """A node without rank 0 is powered off until the others train without it."""
    name = _away_from_storage(place, (2, 1))
    node = place.cluster.nodes[name]
    place.after.callback(place.cluster.wait_for_nodes, name)
    node.power_off()
    try:
        eventually("2 nodes train", lambda: _trained_by(place) == 2, within=240)
    finally:
        node.start()
    place.cluster.wait_for_nodes(name)
    place.platform.advertise_gpus()  # a kubelet that starts forgets them
    eventually("3 nodes train", lambda: _trained_by(place) == 3, within=240)


def _trained_by(place: Place) -> int:
    """Number of nodes that train; 0: the gang is at something else."""
    progress = place.platform.status(place.name)["progress"]
    return int(progress.get("nodes", 0)) if progress["stage"] == "Training" else 0


# --- the operator, its API server, storage -------------------------------------------------------


def operators_killed(place: Place) -> None:
    at = ("-n", SYSTEM)
    for pod in place.cluster.get("pods", *at)["items"]:
        name = pod["metadata"]["name"]
        place.cluster.kubectl(*at, "delete", "pod", name, "--grace-period=0", "--force")


def two_operators(place: Place) -> None:
    """A third operator process, outside of the cluster, with the same Lease."""
    place.after.enter_context(place.platform.operator_outside())


def api_server_restarted(place: Place) -> None:
    place.cluster.stop_api_server()
    time.sleep(60)
    place.cluster.start_api_server()


def storage_stopped(place: Place) -> None:
    _stop_storage(place, 60)


def storage_stopped_in_publish(place: Place) -> None:
    _stop_storage(place, 600)


def _stop_storage(place: Place, seconds: float) -> None:
    uid = place.cluster.get("pod", "s3", "-n", "storage")["metadata"]["uid"]
    found = processes_of(uid, r"\bweed\b")
    assert found
    for process in found:
        process.signal(signal.SIGSTOP)
    try:
        time.sleep(seconds)
    finally:
        for process in found:
            process.signal(signal.SIGCONT)


# --- the user ------------------------------------------------------------------------------------


def suspended(place: Place) -> None:
    place.edit(suspend=True)
    place.phase("Suspended")
    eventually("no pod is left", lambda: not _alive(place), within=180)
    place.edit(suspend=False)


def _alive(place: Place) -> list[str]:
    pods = [p for role in ("map", "prepare", "train", "publish")
            for p in place.platform.pods(place.name, role)]  # fmt: skip
    return [p["metadata"]["name"] for p in pods if p["status"]["phase"] in ("Pending", "Running")]


def live_field_edited(place: Place) -> None:
    place.edit(failurePolicy={"maxRestarts": 7})


def resume_field_edited(place: Place) -> None:
    place.edit(compute={"resources": {"requests": {"cpu": "101m"}}})


@dataclass(frozen=True)
class Scenario:
    """A disturbance of one run, and how its status must end."""

    what: str
    """For people, in the table."""
    act: Callable[[Place], None]
    phase: str = "Training"
    """Phase in which it happens; Training: after step 10, with a checkpoint."""
    times: int = 1
    faults: int | None = 0
    """Faults in the end; None: 0 or more."""
    restarts: int = 1
    """Fewest restarts of the gang in the end: a disturbance that does nothing shows nothing."""
    spec: dict[str, Any] = field(default_factory=dict)
    steps: int = 60
    """Length of the run."""
    compared: int | None = None
    """Last step whose loss is compared; None: all. With another number of processes sums round
    differently, and over many steps of a small model training amplifies that."""

    @property
    def id(self) -> str:
        return f"{self.act.__name__}-{self.phase}".replace("_", "-").lower()


_APART = {
    "topologyKey": "kubernetes.io/hostname",
    "labelSelector": {"matchLabels": {"finetune-operator.dev/role": "train"}},
}
LIMITED = {
    "requests": {"cpu": "100m", "memory": "256Mi"},
    "limits": {"memory": "3Gi", "ephemeral-storage": "2Gi"},
}
ELASTIC = {
    "nodes": 3,
    "minNodes": 2,
    "podTemplate": {
        "spec": {
            "affinity": {
                "podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [_APART]}
            }
        }
    },
}

SCENARIOS = [
    Scenario("a training process is killed", worker_killed, faults=None),
    Scenario("rank 0's pod is deleted by force", rank_0_deleted, faults=None),
    Scenario("a pod is evicted", evicted),
    Scenario("a training process is stopped by SIGSTOP", rank_stopped, faults=None,
             spec={"failurePolicy": {"progressDeadlineSeconds": 60}}),
    Scenario("a training process is killed for its memory", out_of_memory, faults=None,
             spec={"compute": {"resources": LIMITED}}, steps=400),
    Scenario("a pod fills its disk", disk_full, faults=None,
             spec={"compute": {"resources": LIMITED}}, steps=400),
    Scenario("the kubelet of rank 0 stops for good", kubelet_stopped, faults=None),
    Scenario("a node is powered off and deleted", node_deleted),
    Scenario("a node is drained", drained, times=3),
    Scenario("an elastic gang loses a node, and gets it back", elastic_gang_shrinks_and_grows,
             spec={"compute": ELASTIC}, steps=300, compared=75),
    Scenario("a node has no network for 30 s", network_cut, faults=None, restarts=0),
    Scenario("all operators are killed", operators_killed, restarts=0),
    Scenario("another operator with the same Lease", two_operators, restarts=0),
    Scenario("the API server is away", api_server_restarted, restarts=0),
    Scenario("object storage is away in training", storage_stopped, faults=None, restarts=0),
    Scenario("object storage is away in publish", storage_stopped_in_publish, "Publishing",
             restarts=0),
    Scenario("suspend and resume in prepare", suspended, "Preparing", restarts=0),
    Scenario("suspend and resume in training", suspended, restarts=0),
    Scenario("suspend and resume in publish", suspended, "Publishing", restarts=0),
    Scenario("a Live field is edited", live_field_edited, restarts=0),
    Scenario("a Resume field is edited", resume_field_edited, restarts=0),
]  # fmt: skip
