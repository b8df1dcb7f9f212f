"""Repeated incidents: how long a gang waits until all of its pods run again, on a real API server
with the real Job controller.

    python benchmarks/repeated_incidents.py [--incidents 20] [--nodes 4]

A pod of the gang fails again and again, as soon as the gang is whole. A Job controller doubles its
delay with each failed pod of a Job, up to 10 minutes; "Job alone" is what it would have waited.
Nodes are simulated by kwok: an annotation ends a pod with an exit code and a termination message.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "operator")]

from operator_process import OperatorProcess  # noqa: E402

from cluster.api import eventually  # noqa: E402
from cluster.control_plane import ControlPlane  # noqa: E402

PLACE = ("-n", "default")
INDEX = "batch.kubernetes.io/job-completion-index"


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--incidents", type=int, default=20)
    made.add_argument("--nodes", type=int, default=4)
    given = made.parse_args()
    with ControlPlane(kwok_nodes=given.nodes + 2) as plane, tempfile.TemporaryDirectory() as folder:
        plane.kubectl("apply", "--server-side", "-f", ROOT / "crds" / "finetunejob.crd.yaml")
        log = Path(folder) / "log"
        with OperatorProcess(plane.kubeconfig, log, "--leader-election", "false"):
            measure(plane, given.nodes, given.incidents)


def measure(plane: ControlPlane, nodes: int, count: int) -> None:
    eventually("the CRD is served", lambda: plane.get("finetunejobs", *PLACE))
    plane.apply(body("bot", nodes))
    (prepare,) = whole_gang(plane, "prepare", 1)
    end(plane, prepare, 0, "")
    pods = whole_gang(plane, "train", nodes)
    waits = []
    for number in range(count):
        began = time.monotonic()
        end(plane, next(p for p in pods if index_of(p) == 1), 20, run_of(pods[0]))
        pods = whole_gang(plane, "train", nodes, without=pods)
        waits.append(time.monotonic() - began)
        alone = min(10 * 2**number, 600)
        print(f"incident {number + 1}: {waits[-1]:.1f} s (Job alone: {alone} s)", flush=True)
    status = plane.get("ftj", "bot", *PLACE)["status"]
    print(
        f"{count} incidents: longest wait {max(waits):.1f} s, {sum(waits):.0f} s in all; restarts"
        f" {status['restarts']}, revision {status['run']['revision']}"
    )


def whole_gang(
    plane: ControlPlane, role: str, count: int, without: list[dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Wait until pods of all indexes run, one of which is new; return them."""
    old = {p["metadata"]["uid"] for p in without or []}

    def look() -> list[dict[str, Any]] | None:
        selector = f"finetune-operator.dev/role={role}"
        found = [p for p in plane.get("pods", *PLACE, "-l", selector)["items"] if runs(p)]
        fresh = not old or any(p["metadata"]["uid"] not in old for p in found)
        return found if fresh and {index_of(p) for p in found} == set(range(count)) else None

    return eventually(f"all pods of {role} run", look, within=900)


def runs(pod: dict[str, Any]) -> bool:
    alive = "deletionTimestamp" not in pod["metadata"]
    return alive and pod["status"].get("phase") == "Running"


def index_of(pod: dict[str, Any]) -> int:
    return int(pod["metadata"].get("annotations", {}).get(INDEX, 0))


def run_of(pod: dict[str, Any]) -> str:
    return str(pod["metadata"]["labels"]["finetune-operator.dev/run"])


def end(plane: ControlPlane, pod: dict[str, Any], code: int, run: str) -> None:
    """End a pod; with a run, as a training process that was lost."""
    failure = {"class": "NodeFailure", "reason": "GangNotFormed", "message": "x", "retryable": True}
    message = json.dumps({"run": run, "role": "train", "failure": failure}) if run else ""
    notes = [f"kwok.test/exit-code={code}", f"kwok.test/message={message}"]
    plane.kubectl("annotate", "pod", pod["metadata"]["name"], *PLACE, *notes)


def body(name: str, nodes: int) -> dict[str, Any]:
    return {
        "apiVersion": "finetune-operator.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "model": {"source": "s3://models/base"},
            "data": {"train": [{"source": "s3://data/train.jsonl"}]},
            "compute": {"gpusPerNode": 0, "nodes": nodes},
            "failurePolicy": {"maxRestarts": 1000},
            "output": {"destination": f"s3://models/{name}"},
        },
    }


if __name__ == "__main__":
    main()
