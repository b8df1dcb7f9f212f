"""Simulated nodes for an API without kubelets: kwok writes the status that a kubelet would.

A pod bound to such a node is Running immediately. It ends when its annotation
``kwok.test/exit-code`` is set, by the test on the pod or beforehand in the pod template.
``kwok.test/message`` is its termination message.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.api import eventually
from cluster.build import binary

if TYPE_CHECKING:
    from cluster.control_plane import ControlPlane

EXIT_CODE = "kwok.test/exit-code"
MESSAGE = "kwok.test/message"
_STAGES = Path(__file__).with_name("kwok_stages.yaml")


def start(plane: ControlPlane, kubeconfig: Path, nodes: int, flags: Sequence[str] = ()) -> None:
    """Start kwok and register the nodes ``kwok-0``, ``kwok-1``, …; returns when they are Ready."""
    plane.processes.start(
        "kwok",
        [
            binary("kwok"),
            f"--kubeconfig={kubeconfig}",
            f"--config={_STAGES}",
            "--manage-all-nodes=true",
            "--node-lease-duration-seconds=8",
            "--server-address=127.0.0.1:0",
            *flags,
        ],
    )
    plane.apply(*(_node(f"kwok-{index}") for index in range(nodes)))
    eventually("kwok's nodes are ready", lambda: _ready(plane) == nodes)


def _node(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
    }


def _ready(plane: ControlPlane) -> int:
    path = "{.items[*].status.conditions[?(@.type=='Ready')].status}"
    return plane.kubectl("get", "nodes", "-o", f"jsonpath={path}").split().count("True")
