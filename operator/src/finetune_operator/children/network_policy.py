"""The NetworkPolicy of a stage: no traffic to its pods, apart from the traffic within a gang, and
reads of a gang's metrics port.

The rendezvous store of a gang unpickles what it receives, so whoever reaches that port runs code in
the pod, beside its storage keys. gloo and NCCL listen on ports of their own choice: between the
pods of one gang all ports are open.
"""

from __future__ import annotations

from finetune_api import names
from finetune_api.identity import child_name
from finetune_api.names import Role
from finetune_operator.children.metadata import Json, labels_of, metadata, selector_of
from finetune_operator.config import ANNOTATION_ACCESS, NetworkAccess
from finetune_operator.decision.plan import CurrentRun, Subject
from finetune_operator.decision.stages import GANG


def stage_policy(subject: Subject, run: CurrentRun, role: Role, access: NetworkAccess) -> Json:
    """NetworkPolicy of the pods of a stage, in one revision of a run. It has the name and the
    labels of the stage's Job."""
    labels = labels_of(subject, run, role)
    meta = metadata(subject, child_name(subject.name, run.id, role, run.revision), labels)
    meta["annotations"] = {ANNOTATION_ACCESS: access.digest}
    selector: Json = {"matchLabels": selector_of(labels)}
    spec: Json = {
        "podSelector": selector,
        "policyTypes": ["Ingress"],
        "ingress": _ingress(selector, access) if role == GANG else [],
    }
    if access.egress:
        peers = [{"to": [{"podSelector": selector}]}] if role == GANG else []
        spec["policyTypes"].append("Egress")
        spec["egress"] = [*peers, *access.egress]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": meta,
        "spec": spec,
    }


def _ingress(gang: Json, access: NetworkAccess) -> list[Json]:
    metrics: Json = {"ports": [{"port": names.METRICS_PORT, "protocol": "TCP"}]}
    if access.metrics_from:
        metrics["from"] = list(access.metrics_from)
    return [{"from": [{"podSelector": gang}]}, metrics]
