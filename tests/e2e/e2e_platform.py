"""The platform of the e2e tests: a cluster with S3 and the operator, and what tests do with it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from cluster.api import Api, eventually
from cluster.build import binary
from finetune_trainer.failures import TrainerError
from finetune_trainer.storage.objects import ObjectStore

ROOT = Path(__file__).resolve().parents[2]
OPERATOR = "finetune-operator:e2e"
TRAINER = "finetune-trainer:e2e"
SYSTEM, TEAM = "finetune-system", "team-a"
KEYS = ("e2e-access-key", "e2e-secret-key-of-the-tests")
S3_PORT = 9000
Manifest = dict[str, Any]


def held(pod: Manifest, resource: str, last: float) -> float:
    """GPU-seconds that a pod held, which was last seen at a Unix time."""
    gpus = int(pod["spec"]["containers"][0]["resources"]["limits"].get(resource, 0))
    conditions = {c["type"]: c for c in pod["status"].get("conditions", [])}
    scheduled = conditions.get("PodScheduled", {})
    if scheduled.get("status") != "True":
        return 0.0
    states = [c.get("state", {}) for c in pod["status"].get("containerStatuses", [])]
    ends = [s["terminated"]["finishedAt"] for s in states if "terminated" in s]
    end = datetime.fromisoformat(ends[0]).timestamp() if ends else last
    return gpus * (end - datetime.fromisoformat(scheduled["lastTransitionTime"]).timestamp())


@dataclass
class Platform:
    """Cluster, images and object storage of the tests."""

    cluster: Api
    operator: str
    """Image of the operator."""
    trainer: str
    """Image of the trainer."""
    store: ObjectStore
    endpoint: str
    """S3 endpoint for pods."""
    inputs: Path
    """The quickstart's model and data, also under ``s3://input/``."""
    made: list[str] = field(default_factory=list)

    def install(self, *values: str) -> None:
        """``helm upgrade`` the operator with other values, and wait until it is ready."""
        install(self.cluster, self.operator, self.trainer, *values)

    def kubectl(self, *arguments: str | Path, stdin: str | None = None) -> str:
        return self.cluster.kubectl("--namespace", TEAM, *arguments, stdin=stdin)

    def job(self, name: str) -> Manifest:
        found: Manifest = self.cluster.get("finetunejob", name, "-n", TEAM)
        return found

    def status(self, name: str) -> Manifest:
        return dict(self.job(name).get("status", {}))

    def apply(self, manifest: Manifest) -> str:
        """``kubectl apply`` a manifest. Returns the job's name."""
        self.kubectl("apply", "-f", "-", stdin=json.dumps(manifest))
        name = str(manifest["metadata"]["name"])
        self.made.append(name)
        return name

    def pods(self, name: str, role: str) -> list[Manifest]:
        labels = f"finetune-operator.dev/job-name={name},finetune-operator.dev/role={role}"
        found: list[Manifest] = self.cluster.get("pods", "-n", TEAM, "-l", labels)["items"]
        return found

    @contextmanager
    def held_gpu_seconds(self, name: str, resource: str) -> Iterator[Callable[[], float]]:
        """Watch the pods of a job's gang; the function returns the GPU-seconds that they held, from
        the time a pod had a node to its end, by the pods' own times."""
        seen: dict[str, tuple[Manifest, float]] = {}
        ended = threading.Event()

        def look() -> None:
            while not ended.wait(0.5):
                for pod in self.pods(name, "train"):
                    seen[pod["metadata"]["uid"]] = (pod, time.time())

        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        try:
            yield lambda: sum(held(pod, resource, last) for pod, last in seen.values())
        finally:
            ended.set()
            watcher.join()

    def wait(self, name: str, condition: str, *, within: float = 400) -> Manifest:
        """Wait until a condition is true and return the status. Fails the test as soon as the job
        has failed."""

        def look() -> Manifest | None:
            status = self.status(name)
            if holds(status, condition):
                return status
            if condition != "Failed" and holds(status, "Failed"):
                pytest.fail(f"{name} failed: {status['failure']}\n{self.describe(name)}")
            return None

        try:
            return eventually(f"{name} is {condition}", look, within=within)
        except TimeoutError as error:
            pytest.fail(f"{error}\n{self.describe(name)}")

    def advertise_gpus(self) -> str:
        """Add an extended resource to every node, without devices. Returns its name."""
        patch = '{"status": {"capacity": {"example.com/gpu": "8"}}}'
        for node in self.cluster.get("nodes")["items"]:
            name = node["metadata"]["name"]
            self.cluster.kubectl(
                "patch", "node", name, "--subresource=status", "--type=merge", "-p", patch
            )
        return "example.com/gpu"

    def operator_metrics(self) -> str:
        """Read the metrics page of the operator that leads, through the API server."""
        lease = self.cluster.get("lease", "finetune-operator", "-n", SYSTEM)
        pod = lease["spec"]["holderIdentity"].rpartition("-")[0]
        path = f"/api/v1/namespaces/{SYSTEM}/pods/{pod}:8080/proxy/metrics"
        return self.cluster.kubectl("get", "--raw", path)

    def scale_operator(self, replicas: int) -> None:
        """Stop or start the operator that the chart installed, and wait until that is done."""
        at = ("-n", SYSTEM)
        deployment = "deployment/finetune-operator"
        self.cluster.kubectl(*at, "scale", deployment, f"--replicas={replicas}")
        if replicas:
            self.cluster.kubectl(*at, "rollout", "status", deployment, "--timeout=120s")
            return
        selector = "app.kubernetes.io/name=finetune-operator"
        eventually(
            "the operator is gone",
            lambda: not self.cluster.get("pods", *at, "-l", selector)["items"],
            within=60,
        )

    @contextmanager
    def operator_outside(self) -> Iterator[None]:
        """Run ``python -m finetune_operator`` on this machine, outside of the cluster."""
        process = subprocess.Popen(
            [
                sys.executable, "-m", "finetune_operator",
                "--kubeconfig", str(self.cluster.kubeconfig),
                "--image", self.trainer, "--host", "127.0.0.1", "--port", "0",
                "--lease-namespace", SYSTEM,
            ]
        )  # fmt: skip
        try:
            yield
        finally:
            process.terminate()
            assert process.wait(30) == 0

    def wait_for_step(
        self, name: str, step: int, *, committed: bool = True, within: float = 240
    ) -> Manifest:
        """Wait until training has done ``step`` steps and (``committed``) a checkpoint exists.
        Returns the status."""

        def look() -> Manifest | None:
            status = self.status(name)
            if holds(status, "Failed"):
                pytest.fail(f"{name} failed: {status['failure']}\n{self.describe(name)}")
            done = status.get("progress", {}).get("step", 0)
            saved = status.get("checkpoints", {}).get("latest")
            return status if done >= step and (saved or not committed) else None

        try:
            return eventually(f"{name} reaches step {step}", look, within=within)
        except TimeoutError as error:
            pytest.fail(f"{error}\n{self.describe(name)}")

    def describe(self, name: str) -> str:
        """Return status, objects, events and logs, for the message of a failed test."""
        parts = [json.dumps(self.status(name), indent=1)]
        parts.append(self.kubectl("get", "pods,jobs", "-o", "wide"))
        parts.append(self.kubectl("get", "events", "--sort-by=.lastTimestamp")[-3000:])
        for role in ("map", "prepare", "train", "publish"):
            for pod in self.pods(name, role):
                pod_name = pod["metadata"]["name"]
                try:
                    log = self.kubectl("logs", pod_name, "--tail=30")
                except RuntimeError as error:
                    log = str(error)
                parts.append(f"--- {pod_name}\n{log}")
        logs = self.cluster.kubectl("-n", SYSTEM, "logs", "deploy/finetune-operator", "--tail=40")
        return "\n".join([*parts, "--- operator", logs])

    def delete(self, name: str) -> None:
        self.kubectl("delete", "finetunejob", name, "--ignore-not-found", "--wait=false")


def holds(status: Manifest, condition: str) -> bool:
    return any(
        c["type"] == condition and c["status"] == "True" for c in status.get("conditions", [])
    )


@contextmanager
def forwarded(cluster: Api) -> Iterator[str]:
    """Forward S3 to loopback, for a cluster whose pods cannot be reached from this machine."""
    command = [binary("kubectl"), "--kubeconfig", cluster.kubeconfig, "-n", "storage"]
    process = subprocess.Popen([*command, "port-forward", "pod/s3", f"{S3_PORT}:{S3_PORT}"])
    try:
        yield "127.0.0.1"
    finally:
        process.terminate()
        process.wait(10)


def start_s3(cluster: Api, image: str) -> str:
    """Start SeaweedFS, from the trainer's image, as a pod. Returns the pod's address."""
    flags = "-dir=/data -ip.bind=0.0.0.0 -webdav=false -admin.ui=false -master.telemetry=false"
    cluster.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "storage"}},
        {
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "s3", "namespace": "storage", "labels": {"app": "s3"}},
            "spec": {
                "containers": [
                    {
                        "name": "s3", "image": image, "imagePullPolicy": "IfNotPresent",
                        "command": ["sh", "-c",
                            f"exec weed mini {flags} -s3.port={S3_PORT} -ip=$(hostname -i)"
                            " -s3.port.iceberg=0 -s3.port.lance=0 -volume.max=1000"
                            " -s3.autoCreateBucket=false"],
                        "env": [
                            {"name": "AWS_ACCESS_KEY_ID", "value": KEYS[0]},
                            {"name": "AWS_SECRET_ACCESS_KEY", "value": KEYS[1]},
                            {"name": "HOME", "value": "/data"},
                        ],
                        "workingDir": "/data",
                        "readinessProbe": {"tcpSocket": {"port": S3_PORT}, "periodSeconds": 1},
                        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
                    }
                ],
                "securityContext": {"runAsUser": 65532, "fsGroup": 65532},
                "volumes": [{"name": "data", "emptyDir": {}}],
            },
        },
        {
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "s3", "namespace": "storage"},
            "spec": {"selector": {"app": "s3"}, "ports": [{"port": S3_PORT}]},
        },
    )  # fmt: skip

    def address() -> str | None:
        pod = cluster.get("pod", "s3", "-n", "storage")
        ready = any(
            c["type"] == "Ready" and c["status"] == "True"
            for c in pod["status"].get("conditions", [])
        )
        return str(pod["status"]["podIP"]) if ready else None

    return eventually("S3 runs", address, within=120)


def wait_for_s3(store: ObjectStore) -> None:
    """Wait until S3 answers a request, with the error that a bucket does not exist."""

    def answers() -> bool:
        try:
            store.head("s3://none/probe")
        except TrainerError as error:
            return error.reason == "BucketNotFound"
        return True

    eventually("S3 answers", answers, within=60)


def start_empty_registry(cluster: Api, image: str) -> None:
    """Start a server on each node's localhost:5000 that answers every image pull with not found."""
    labels = {"app": "registry"}
    cluster.apply(
        {
            "apiVersion": "apps/v1", "kind": "DaemonSet",
            "metadata": {"name": "registry", "namespace": "storage"},
            "spec": {
                "selector": {"matchLabels": labels},
                "template": {
                    "metadata": {"labels": labels},
                    "spec": {
                        "hostNetwork": True,
                        "containers": [
                            {
                                "name": "registry", "image": image,
                                "imagePullPolicy": "IfNotPresent",
                                "command": ["python3", "-m", "http.server", "5000",
                                            "--bind", "127.0.0.1", "--directory", "/media"],
                            }
                        ],
                    },
                },
            },
        }
    )  # fmt: skip


def install(cluster: Api, operator: str, trainer: str, *values: str) -> None:
    """``helm install`` the operator, and create the team's namespace, which enforces the pod
    security standard *restricted*."""
    cluster.apply(
        {
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": {
                "name": TEAM,
                "labels": {"pod-security.kubernetes.io/enforce": "restricted"},
            },
        },
        {
            "apiVersion": "v1", "kind": "Secret",
            "metadata": {"name": "s3-credentials", "namespace": TEAM},
            "stringData": {"AWS_ACCESS_KEY_ID": KEYS[0], "AWS_SECRET_ACCESS_KEY": KEYS[1]},
        },
        {
            "apiVersion": "v1", "kind": "Secret",
            "metadata": {"name": "wrong-credentials", "namespace": TEAM},
            "stringData": {"AWS_ACCESS_KEY_ID": KEYS[0], "AWS_SECRET_ACCESS_KEY": "guessed"},
        },
    )  # fmt: skip
    done = subprocess.run(
        [
            binary("helm"), "upgrade", "--install", "finetune-operator",
            ROOT / "charts/finetune-operator", "--kubeconfig", cluster.kubeconfig,
            "--namespace", SYSTEM, "--create-namespace", "--wait", "--timeout", "180s",
            *image_values("image", operator), *image_values("trainer.image", trainer),
            "--set", "admission.images={localhost:5000/*}", *values,
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        logs = cluster.kubectl("-n", SYSTEM, "get", "pods,events", "-o", "wide")
        raise RuntimeError(f"{done.stderr}\n{logs}")


def image_values(where: str, image: str) -> list[str]:
    """Return helm's options for an image with a tag."""
    repository, tag = image.rsplit(":", 1)
    return ["--set", f"{where}.repository={repository}", "--set", f"{where}.tag={tag}"]
