"""The cluster of a load: a real control plane, simulated nodes, and an audit log of one user's
requests."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from client import NAMESPACE
from operator_world import PREPARED, PUBLISHED, TRAINED

from cluster import state
from cluster.audit import Audit
from cluster.control_plane import ControlPlane
from finetune_api import names
from finetune_api.results import Termination

CRD = Path(__file__).parents[2] / "crds" / "finetunejob.crd.yaml"
USER = "measured"
"""User of the operator, or of the bare client."""
PODS = "10.64.0.0/16"
"""Addresses of the pods; ``run`` makes them local addresses of its network namespace."""
NODES = 8
_PREPARED, _TRAINED, _PUBLISHED = ({k: v} for k, v in (
    ("prepared", PREPARED), ("trained", TRAINED), ("published", PUBLISHED),
))  # fmt: skip
REPORTS: dict[names.Role, dict[str, Any]] = {
    "prepare": _PREPARED, "train": _TRAINED, "publish": _PUBLISHED,
}  # fmt: skip
"""Content of the termination message of each stage."""


class BenchPlane(ControlPlane):
    """A control plane whose pods of some stages end as soon as they run."""

    def __init__(self, ending: tuple[names.Role, ...] = ("prepare",)) -> None:
        folder = state.claim(f"bench-{'-'.join(ending)}")
        self._audit = Audit(folder, [USER])
        (folder / "stages.yaml").write_text(yaml.safe_dump_all(map(_stage, ending)))
        super().__init__(
            folder,
            kwok_nodes=NODES,
            flags={
                "kube-apiserver": self._audit.flags,
                # Heartbeats may be late under load: no node fails here.
                "kube-controller-manager": ["--node-monitor-grace-period=1h"],
                "kwok": [f"--config={folder / 'stages.yaml'}", f"--cidr={PODS}"],
            },
        )

    def start(self) -> None:
        super().start()
        self.kubectl("apply", "--server-side", "-f", CRD)
        self.user = self.kubeconfig_of(USER, USER, "system:masters")

    def writes(self, agent: str) -> Counter[str]:
        """Number of the user's writes so far, by resource; those of Leases are left out."""
        found = self._audit.writes(agent, NAMESPACE)
        del found["leases"]
        return found


_ENDED = """
{{ $now := Now }}
phase: Succeeded
conditions:
- {type: Ready, status: "False", reason: PodCompleted, lastTransitionTime: {{ $now | Quote }}}
containerStatuses:
{{ $run := index .metadata.labels "LABEL" }}
{{ range .spec.containers }}
- name: {{ .name | Quote }}
  image: {{ .image | Quote }}
  ready: false
  started: false
  restartCount: 0
  state:
    terminated:
      exitCode: 0
      reason: Completed
      message: {{ printf `MESSAGE` $run | Quote }}
      startedAt: {{ $now | Quote }}
      finishedAt: {{ $now | Quote }}
{{ end }}
"""


def _stage(role: names.Role) -> dict[str, Any]:
    """kwok's stage that ends a running pod of a stage with exit code 0 and a valid message."""
    text = Termination.model_validate({"run": "RUN", "role": role, **REPORTS[role]}).to_text()
    message = text.replace("%", "%%").replace("RUN", "%s")
    ended = _ENDED.replace("LABEL", names.LABEL_RUN).replace("MESSAGE", message)
    matches = [
        {"key": ".metadata.deletionTimestamp", "operator": "DoesNotExist"},
        {"key": ".status.phase", "operator": "In", "values": ["Running"]},
        {"key": f'.metadata.labels["{names.LABEL_ROLE}"]', "operator": "In", "values": [role]},
    ]
    return {
        "apiVersion": "kwok.x-k8s.io/v1alpha1",
        "kind": "Stage",
        "metadata": {"name": f"end-{role}"},
        "spec": {
            "resourceRef": {"apiGroup": "v1", "kind": "Pod"},
            "selector": {"matchExpressions": matches},
            "next": {"statusTemplate": ended},
        },
    }
