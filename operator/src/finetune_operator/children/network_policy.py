"""The NetworkPolicy of a run: no traffic to its pods, apart from the traffic within its gang, and
reads of the metrics port.

The rendezvous store of a gang unpickles what it receives, so whoever reaches that port runs code in
the pod, beside its storage keys. gloo and NCCL listen on ports of their own choice: from the gang's
pods all ports are open. Pods of the other stages listen on none.
"""

from __future__ import annotations

from finetune_api import names
from finetune_api.identity import network_policy_name
from finetune_operator.children.metadata import Json, labels_of, metadata
from finetune_operator.config import ANNOTATION_ACCESS, NetworkAccess
from finetune_operator.decision.plan import CurrentRun, Subject
from finetune_operator.decision.stages import GANG


def run_policy(subject: Subject, run: CurrentRun, access: NetworkAccess) -> Json:
    """NetworkPolicy of all pods of a run."""
    labels = labels_of(subject, run, None)
    meta = metadata(subject, network_policy_name(subject.name, run.id), labels)
    meta["annotations"] = {ANNOTATION_ACCESS: access.digest}
    of_run = {key: labels[key] for key in (names.LABEL_JOB_UID, names.LABEL_RUN)}
    gang = {"podSelector": {"matchLabels": of_run | {names.LABEL_ROLE: GANG}}}
    metrics: Json = {"ports": [{"port": names.METRICS_PORT, "protocol": "TCP"}]}
    if access.metrics_from:
        metrics["from"] = list(access.metrics_from)
    spec: Json = {
        "podSelector": {"matchLabels": of_run},
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [gang]}, metrics],
    }
    if access.egress:
        spec["policyTypes"].append("Egress")
        spec["egress"] = [{"to": [gang]}, *access.egress]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": meta,
        "spec": spec,
    }
