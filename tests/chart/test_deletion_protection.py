"""``spec.deletionProtection`` on a real API server, by the chart's admission policy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from chart.conftest import one, render
from cluster.api import Api, eventually
from cluster.control_plane import ControlPlane
from finetune_api.names import API_VERSION, KIND

SPEC = {
    "model": {"source": "s3://models/base"},
    "data": {"train": [{"source": "s3://data/train.jsonl"}]},
    "output": {"destination": "s3://models/tuned"},
    "deletionProtection": True,
}
WORDS = "spec.deletionProtection of FineTuneJob bot is true, and its run has not ended"


@pytest.fixture
def protected(plane: ControlPlane) -> Iterator[tuple[Api, str]]:
    """A control plane with a protected job ``bot``, and the job's namespace."""
    objects = render()
    plane.apply(one(objects, "CustomResourceDefinition"))
    kinds = ("ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding")
    plane.apply(*(one(objects, kind, "deletion.finetune-operator.dev") for kind in kinds))
    namespace = "guarded"
    plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
    eventually("the CRD is served", lambda: plane.get("finetunejobs", "-n", namespace))
    eventually("the policy is active", lambda: _refused(plane, namespace, "probe"))
    plane.apply(_job(namespace, "bot"))
    yield plane, namespace
    # Helm installs nothing over objects that it has not made.
    for kind in reversed(kinds):
        plane.kubectl("delete", kind, "deletion.finetune-operator.dev")
    plane.kubectl("delete", "crd", "finetunejobs.finetune-operator.dev", "--timeout=60s")


def _job(namespace: str, name: str) -> dict[str, Any]:
    metadata = {"namespace": namespace, "name": name}
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": SPEC}


def _refused(plane: Api, namespace: str, name: str) -> bool:
    """Whether the deletion of a protected job is refused: policies act some time after they are
    stored."""
    plane.apply(_job(namespace, name))
    try:
        plane.kubectl("delete", "ftj", name, "-n", namespace, "--wait=false")
    except RuntimeError as error:
        return "deletionProtection" in str(error)
    return False


def test_a_protected_job_is_deleted_only_on_purpose(protected: tuple[Api, str]) -> None:
    plane, namespace = protected
    place = ("-n", namespace)
    for target in (("ftj", "bot"), ("ftj", "--all")):
        with pytest.raises(RuntimeError, match=WORDS):
            plane.kubectl("delete", *target, *place, "--wait=false")
    ended = json.dumps({"status": {"phase": "Complete"}})
    status = ("--subresource=status", "--type=merge", "-p", ended)
    plane.kubectl("patch", "ftj", "probe", *place, *status)
    plane.kubectl("delete", "ftj", "probe", *place)
    off = json.dumps({"spec": {"deletionProtection": False}})
    plane.kubectl("patch", "ftj", "bot", *place, "--type=merge", "-p", off)
    plane.kubectl("delete", "ftj", "bot", *place)
    plane.apply(_job(namespace, "bot"))
    plane.kubectl("delete", "namespace", namespace, "--timeout=60s")
