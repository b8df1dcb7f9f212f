"""Plans to Kubernetes objects: pure, deterministic, one label set, one owner."""

from __future__ import annotations

from finetune_api import names
from finetune_api.identity import child_name, label_value, order_name
from finetune_api.names import FINAL_EXIT_CODES, ExitCode, Role
from finetune_operator.children.podspec import Json, pod_template
from finetune_operator.config import (
    ANNOTATION_IMAGE,
    ANNOTATION_RESTARTS,
    GANG_BACKOFF_LIMIT,
    STAGE_BACKOFF_LIMIT,
    Config,
)
from finetune_operator.decision.plan import Create, CurrentRun, Plan, Subject


def render(plan: Plan, config: Config) -> list[Json]:
    """The objects that a plan creates, in the order in which they are applied."""
    if plan.run is None:
        return []
    return [_render(plan.subject, plan.run, create, config) for create in plan.create]


def _render(subject: Subject, run: CurrentRun, create: Create, config: Config) -> Json:
    if create.kind == "ConfigMap":
        return order_config_map(subject, run)
    assert create.role is not None
    if create.kind == "Service":
        return gang_service(subject, run)
    return stage_job(subject, run, create.role, config)


def labels_of(subject: Subject, run: CurrentRun, role: Role | None) -> dict[str, str]:
    """The label set of every child; ``role`` is left out of what serves all stages."""
    labels = {
        names.LABEL_MANAGED_BY: names.MANAGED_BY,
        names.LABEL_NAME: names.APP_NAME,
        names.LABEL_JOB_UID: subject.uid,
        names.LABEL_JOB_NAME: label_value(subject.name),
        names.LABEL_RUN: run.id,
        names.LABEL_REVISION: str(run.revision),
    }
    return labels | ({names.LABEL_ROLE: role} if role else {})


def _meta(subject: Subject, name: str, labels: dict[str, str]) -> Json:
    return {
        "name": name,
        "namespace": subject.namespace,
        "labels": labels,
        "ownerReferences": [
            {
                "apiVersion": names.API_VERSION,
                "kind": names.KIND,
                "name": subject.name,
                "uid": subject.uid,
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ],
    }


def order_config_map(subject: Subject, run: CurrentRun) -> Json:
    """The run's order, immutable; it is also the snapshot that a changed spec is compared with."""
    name = order_name(subject.name, run.id, run.revision)
    meta = _meta(subject, name, labels_of(subject, run, None))
    meta["annotations"] = {
        ANNOTATION_IMAGE: run.image,
        ANNOTATION_RESTARTS: str(run.restarts_before),
    }
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": meta,
        "immutable": True,
        "data": {names.ORDER_KEY: run.order.to_text()},
    }


def gang_service(subject: Subject, run: CurrentRun) -> Json:
    """Headless Service that gives the gang's pods their names, also before they are ready."""
    labels = labels_of(subject, run, "train")
    name = child_name(subject.name, run.id, "train", run.revision)
    picked = (names.LABEL_JOB_UID, names.LABEL_RUN, names.LABEL_REVISION, names.LABEL_ROLE)
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _meta(subject, name, labels),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {key: labels[key] for key in picked},
            "ports": [
                {
                    "name": names.RENDEZVOUS_PORT_NAME,
                    "port": names.RENDEZVOUS_PORT,
                    "protocol": "TCP",
                },
                {"name": names.METRICS_PORT_NAME, "port": names.METRICS_PORT, "protocol": "TCP"},
            ],
        },
    }


def stage_job(subject: Subject, run: CurrentRun, role: Role, config: Config) -> Json:
    """The Job of a stage: one pod to publish, an Indexed Job of workers to prepare, or the gang.

    A queue's Job is made suspended, and from then on left to Kueue.
    """
    spec = run.order.spec
    labels = labels_of(subject, run, role)
    meta = _meta(subject, child_name(subject.name, run.id, role, run.revision), labels)
    body: Json = {
        "backoffLimit": STAGE_BACKOFF_LIMIT,
        "completions": 1,
        "parallelism": 1,
        "podFailurePolicy": _pod_failure_policy(),
        "template": pod_template(subject, run, role, labels, config),
    }
    if role == "prepare":
        # Each worker has its tries: what fails all at once (storage that is down) is one of each,
        # and one that always dies ends the stage soon.
        del body["backoffLimit"]
        body |= _indexed(spec.prepare.workers)
        body |= {"backoffLimitPerIndex": STAGE_BACKOFF_LIMIT, "maxFailedIndexes": 0}
    if role == "train":
        body |= _indexed(spec.compute.nodes) | {"backoffLimit": GANG_BACKOFF_LIMIT}
        if spec.scheduling.queue_name is not None:
            meta["labels"] = labels | {names.LABEL_QUEUE: spec.scheduling.queue_name}
            body["suspend"] = True
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": meta, "spec": body}


def _indexed(pods: int) -> Json:
    return {"completionMode": "Indexed", "completions": pods, "parallelism": pods}


def _pod_failure_policy() -> Json:
    """What no other try can mend ends the Job; a pod that was taken away is none of its faults.

    The first rule that matches decides: a drained pod that ends with a final code has failed. A
    fenced pod is a left-over of an earlier attempt and must not end the attempt that fenced it.
    """
    return {
        "rules": [
            {
                "action": "Ignore",
                "onExitCodes": {
                    "containerName": names.CONTAINER,
                    "operator": "In",
                    "values": [int(ExitCode.FENCED)],
                },
            },
            {
                "action": "FailJob",
                "onExitCodes": {
                    "containerName": names.CONTAINER,
                    "operator": "In",
                    "values": [c for c in FINAL_EXIT_CODES if c != ExitCode.FENCED],
                },
            },
            {
                "action": "Ignore",
                "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
            },
        ]
    }
