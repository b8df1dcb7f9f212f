"""A platform as a user has it: a real cluster, S3 in it, the operator installed by its chart."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cluster import images
from cluster.api import eventually
from cluster.build import binary
from cluster.real import RealCluster
from finetune_trainer.objects import Credentials, ObjectStore
from finetune_trainer.quickstart import make_quickstart
from timings import timed

ROOT = Path(__file__).resolve().parents[2]
OPERATOR = "finetune-operator:e2e"
TRAINER = "finetune-trainer:e2e"
SYSTEM, TEAM = "finetune-system", "team-a"
KEYS = ("e2e-access-key", "e2e-secret-key-of-the-tests")
S3_PORT = 9000
Manifest = dict[str, Any]


@pytest.fixture(scope="session")
def cluster_images(needs_root: None) -> list[str]:
    """The project's images, from the Dockerfiles that users build, and their base."""
    torch = importlib.metadata.version("torch").split("+")[0]
    with timed("base images"):
        base, lean = images.base(), images.torch_base(torch)
    with timed("operator image"):
        operator = images.build(
            ROOT, OPERATOR, {"BASE_IMAGE": base}, dockerfile=ROOT / "operator/Dockerfile"
        )
    with timed("trainer image"):
        trainer = images.build(
            ROOT, TRAINER, {"BASE_IMAGE": lean, "TORCH_REQUIREMENT": ""},
            dockerfile=ROOT / "trainer-image/Dockerfile",
        )  # fmt: skip
    return [base, operator, trainer]


@dataclass
class Platform:
    """What the tests act on."""

    cluster: RealCluster
    store: ObjectStore
    endpoint: str
    """S3 as pods reach it."""
    inputs: Path
    """The quickstart's model and data, also under ``s3://input/``."""
    made: list[str] = field(default_factory=list)

    def kubectl(self, *arguments: str | Path, stdin: str | None = None) -> str:
        return self.cluster.kubectl("--namespace", TEAM, *arguments, stdin=stdin)

    def job(self, name: str) -> Manifest:
        found: Manifest = self.cluster.get("finetunejob", name, "-n", TEAM)
        return found

    def status(self, name: str) -> Manifest:
        return dict(self.job(name).get("status", {}))

    def apply(self, manifest: Manifest) -> str:
        """``kubectl apply`` of a manifest; returns the job's name."""
        self.kubectl("apply", "-f", "-", stdin=json.dumps(manifest))
        name = str(manifest["metadata"]["name"])
        self.made.append(name)
        return name

    def pods(self, name: str, role: str) -> list[Manifest]:
        labels = f"finetune-operator.dev/job-name={name},finetune-operator.dev/role={role}"
        found: list[Manifest] = self.cluster.get("pods", "-n", TEAM, "-l", labels)["items"]
        return found

    def wait(self, name: str, condition: str, *, within: float = 400) -> Manifest:
        """The status once a condition is true; fails at once when the job fails otherwise."""

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

    def wait_for_step(self, name: str, step: int, *, within: float = 240) -> Manifest:
        """The status once training has done so many steps and a commit is there."""

        def look() -> Manifest | None:
            status = self.status(name)
            if holds(status, "Failed"):
                pytest.fail(f"{name} failed: {status['failure']}\n{self.describe(name)}")
            done = status.get("progress", {}).get("step", 0)
            committed = status.get("checkpoints", {}).get("latest")
            return status if done >= step and committed else None

        try:
            return eventually(f"{name} reaches step {step}", look, within=within)
        except TimeoutError as error:
            pytest.fail(f"{error}\n{self.describe(name)}")

    def describe(self, name: str) -> str:
        """What a person would look at next."""
        parts = [json.dumps(self.status(name), indent=1)]
        parts.append(self.kubectl("get", "pods,jobs", "-o", "wide"))
        parts.append(self.kubectl("get", "events", "--sort-by=.lastTimestamp")[-3000:])
        for role in ("prepare", "train", "publish"):
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


@pytest.fixture(scope="session")
def platform(
    cluster: RealCluster, cluster_images: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Platform]:
    """Cluster, S3, operator; the namespace of a team with its Secret."""
    inputs = tmp_path_factory.mktemp("inputs")
    with timed("quickstart model and data"):
        make_quickstart(inputs)
    with timed("S3 in the cluster"):
        address = start_s3(cluster, images.full_name(TRAINER))
        keys = Credentials(KEYS[0], KEYS[1], None, "the tests' keys")
        store = ObjectStore(f"http://{address}:{S3_PORT}", credentials=keys)
        store.create_bucket("input")
        store.create_bucket("output")
        for path in sorted(p for p in inputs.rglob("*") if p.is_file()):
            store.upload(path, f"s3://input/{path.relative_to(inputs)}")
    start_empty_registry(cluster, cluster_images[0])
    with timed("helm install"):
        install(cluster)
    endpoint = f"http://s3.storage.svc.cluster.local:{S3_PORT}"
    yield Platform(cluster, store, endpoint, inputs)


def start_s3(cluster: RealCluster, image: str) -> str:
    """SeaweedFS, from the trainer's image, as a pod; returns the pod's address."""
    flags = "-dir=/data -ip.bind=0.0.0.0 -webdav=false -admin.ui=false -master.telemetry=false"
    cluster.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "storage"}},
        {
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "s3", "namespace": "storage", "labels": {"app": "s3"}},
            "spec": {
                "containers": [
                    {
                        "name": "s3", "image": image, "imagePullPolicy": "Never",
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

    found = eventually("S3 runs", address, within=120)

    def answers() -> bool:
        keys = Credentials(KEYS[0], KEYS[1], None, "the tests' keys")
        try:
            ObjectStore(f"http://{found}:{S3_PORT}", credentials=keys).head("s3://none/probe")
        except Exception as error:
            return getattr(error, "reason", "") == "BucketNotFound"
        return True

    eventually("S3 answers", answers, within=60)
    return found


def start_empty_registry(cluster: RealCluster, image: str) -> None:
    """What answers on each node's localhost:5000 that it has no such image."""
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
                                "name": "registry", "image": image, "imagePullPolicy": "Never",
                                "command": ["python3", "-m", "http.server", "5000",
                                            "--bind", "127.0.0.1", "--directory", "/media"],
                            }
                        ],
                    },
                },
            },
        }
    )  # fmt: skip


def install(cluster: RealCluster) -> None:
    """``helm install``, and the team's namespace, which enforces the restricted pod standard."""
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
            "--set", f"image.repository={images.full_name(OPERATOR).rsplit(':', 1)[0]}",
            "--set", "image.tag=e2e",
            "--set", f"trainer.image.repository={images.full_name(TRAINER).rsplit(':', 1)[0]}",
            "--set", "trainer.image.tag=e2e",
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        logs = cluster.kubectl("-n", SYSTEM, "get", "pods,events", "-o", "wide")
        raise RuntimeError(f"{done.stderr}\n{logs}")


ManifestOf = Callable[..., Manifest]


@pytest.fixture(scope="session")
def manifest_of(platform: Platform) -> ManifestOf:
    """``manifest_of(name, **spec)``: the cluster quickstart under another name and destination,
    with blocks of the spec laid over it."""
    import yaml

    text = (ROOT / "examples/quickstart-cluster.yaml").read_text()

    def make(name: str, **spec: Any) -> Manifest:
        manifest: Manifest = yaml.safe_load(text)
        manifest["metadata"]["name"] = name
        base = manifest["spec"]
        text_of_inputs = json.dumps(base["data"]).replace("s3://quickstart/input/", "s3://input/")
        base["data"] = json.loads(text_of_inputs)
        base["model"]["source"] = "s3://input/model"
        base["output"]["destination"] = f"s3://output/{name}"
        base["storage"]["endpoint"] = platform.endpoint
        base["compute"]["resources"] = {"requests": {"cpu": "100m", "memory": "256Mi"}}
        for block, value in spec.items():
            if isinstance(value, dict) and isinstance(base.get(block), dict):
                base[block] = {k: v for k, v in (base[block] | value).items() if v is not None}
            else:
                base[block] = value
        return manifest

    return make
