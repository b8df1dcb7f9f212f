"""Operator latency: jobs are created at a steady rate on a real API server.

    python benchmarks/operator_latency.py [--jobs 100] [--rate 20]

Prints p50, p99 and maximum of the time from the request to create a FineTuneJob to its first child
Job, as seen by a separate watch. Nodes are simulated by kwok.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import kubernetes.client
import kubernetes.config
import kubernetes.watch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "operator")]

from operator_process import OperatorProcess  # noqa: E402

from cluster.control_plane import ControlPlane  # noqa: E402

GROUP, VERSION, PLURAL = "finetune-operator.dev", "v1alpha1", "finetunejobs"


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--jobs", type=int, default=100)
    made.add_argument("--rate", type=float, default=20.0, help="creations per second")
    given = made.parse_args()
    with ControlPlane(kwok_nodes=4) as plane, tempfile.TemporaryDirectory() as folder:
        plane.kubectl("apply", "--server-side", "-f", ROOT / "crds" / "finetunejob.crd.yaml")
        log = Path(folder) / "log"
        with OperatorProcess(plane.kubeconfig, log, "--leader-election", "false") as operator:
            measure(plane.kubeconfig, given.jobs, given.rate)
            cpu = operator.metric("process_cpu_seconds_total")
            passes = operator.metric("finetune_operator_reconcile_seconds_count")
            print(f"operator: {passes:.0f} passes, {cpu:.2f} s of CPU since its start")


def measure(kubeconfig: Path, count: int, rate: float) -> None:
    kubernetes.config.load_kube_config(str(kubeconfig))
    created: dict[str, float] = {}
    child: dict[str, float] = {}
    watcher = threading.Thread(target=watch_children, args=(child, count), daemon=True)
    watcher.start()
    api = kubernetes.client.CustomObjectsApi()
    began = time.monotonic()
    for number in range(count):
        time.sleep(max(0.0, began + number / rate - time.monotonic()))
        name = f"job-{number:04d}"
        created[name] = time.monotonic()
        api.create_namespaced_custom_object(GROUP, VERSION, "default", PLURAL, body(name))
    watcher.join(timeout=120)
    report("create -> child Job", [child[n] - created[n] for n in created if n in child], count)


def watch_children(child: dict[str, float], count: int) -> None:
    watch = kubernetes.watch.Watch()
    jobs = kubernetes.client.BatchV1Api()
    for event in watch.stream(jobs.list_namespaced_job, "default", timeout_seconds=180):
        name = event["object"].metadata.labels["finetune-operator.dev/job-name"]
        child.setdefault(name, time.monotonic())
        if len(child) == count:
            return


def report(what: str, seconds: list[float], count: int) -> None:
    seconds.sort()
    if not seconds:
        print(f"{what}: none of {count}")
        return
    p50, p99 = seconds[len(seconds) // 2], seconds[min(len(seconds) - 1, len(seconds) * 99 // 100)]
    print(
        f"{what}: {len(seconds)} of {count}, p50 {p50:.3f} s, p99 {p99:.3f} s,"
        f" max {seconds[-1]:.3f} s"
    )


def body(name: str) -> dict[str, Any]:
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": {
            "model": {"source": "s3://models/base"},
            "data": {"train": [{"source": "s3://data/train.jsonl"}]},
            "compute": {"gpusPerNode": 0},
            "output": {"destination": f"s3://models/{name}"},
        },
    }


if __name__ == "__main__":
    main()
