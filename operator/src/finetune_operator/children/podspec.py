"""The pod of each stage: one container that runs under the restricted pod security standard on a
read-only root, with everything it writes on emptyDir volumes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

from finetune_api import names
from finetune_api.cluster import Resources
from finetune_api.identity import child_name, order_name
from finetune_api.names import Role
from finetune_api.order import RunOrder
from finetune_api.spec import FineTuneJobSpec
from finetune_operator.children.overlay import for_cpu_stage, lay_over
from finetune_operator.config import GRACE_SECONDS, NODE_LOST_SECONDS, USER_ID, Config
from finetune_operator.decision.plan import CurrentRun, Subject
from finetune_operator.world.pods import INDEX_ANNOTATION

Json = dict[str, Any]

COMMANDS: Final[dict[Role, str]] = {
    "prepare": "prepare",
    "train": "supervise",
    "publish": "publish",
}
_CACHES: Final = {
    "HF_HOME": "huggingface",
    "XDG_CACHE_HOME": "cache",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "CUDA_CACHE_PATH": "cuda",
}


def pod_template(
    subject: Subject, run: CurrentRun, role: Role, labels: dict[str, str], config: Config
) -> Json:
    """Pod template of a stage, with ``compute.podTemplate`` laid over it."""
    spec = run.order.spec
    base = {"metadata": {"labels": labels}, "spec": _pod_spec(subject, run, role, labels, config)}
    top = spec.compute.pod_template or {}
    laid: Json = lay_over(base, top if role == "train" else for_cpu_stage(top))
    return laid


def _pod_spec(
    subject: Subject, run: CurrentRun, role: Role, labels: dict[str, str], config: Config
) -> Json:
    spec = run.order.spec
    pod: Json = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "tolerations": [
            {
                "key": f"node.kubernetes.io/{state}",
                "operator": "Exists",
                "effect": "NoExecute",
                "tolerationSeconds": NODE_LOST_SECONDS,
            }
            for state in ("not-ready", "unreachable")
        ],
        "containers": [_container(subject, run, role, config)],
        "volumes": _volumes(subject, run, role, config),
    }
    if spec.storage.service_account_name is not None:
        pod["serviceAccountName"] = spec.storage.service_account_name
    if spec.scheduling.priority_class_name is not None:
        pod["priorityClassName"] = spec.scheduling.priority_class_name
    pod |= _gang_placement(subject, run, labels, spec) if role == "train" else {}
    if role != "train":
        _place_cpu_stage(pod, spec)
    return pod


def _gang_placement(
    subject: Subject, run: CurrentRun, labels: dict[str, str], spec: FineTuneJobSpec
) -> Json:
    placed: Json = {
        "subdomain": child_name(subject.name, run.id, "train", run.revision),
        # One pod a node where there are nodes enough.
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {
                    "matchLabels": {
                        k: labels[k]
                        for k in (names.LABEL_JOB_UID, names.LABEL_RUN, names.LABEL_ROLE)
                    }
                },
            }
        ],
    }
    if spec.scheduling.scheduler_name is not None:
        placed["schedulerName"] = spec.scheduling.scheduler_name
    return placed


def _place_cpu_stage(pod: Json, spec: FineTuneJobSpec) -> None:
    if spec.prepare.node_selector:
        pod["nodeSelector"] = dict(spec.prepare.node_selector)
    pod["tolerations"] += [t.to_json() for t in spec.prepare.tolerations or []]


def _container(subject: Subject, run: CurrentRun, role: Role, config: Config) -> Json:
    spec = run.order.spec
    container: Json = {
        "name": names.CONTAINER,
        "image": run.image,
        "args": [COMMANDS[role]],
        "env": list(_env(subject, run, role, config)),
        "resources": _resources(spec, role),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePath": names.TERMINATION_PATH,
        "terminationMessagePolicy": "File",
        "volumeMounts": _mounts(run.order, role, config),
    }
    if config.image_pull_policy is not None:
        container["imagePullPolicy"] = config.image_pull_policy
    if role == "train":
        container["ports"] = [
            {"name": names.METRICS_PORT_NAME, "containerPort": names.METRICS_PORT},
            {"name": names.RENDEZVOUS_PORT_NAME, "containerPort": names.RENDEZVOUS_PORT},
        ]
    return container


def _resources(spec: FineTuneJobSpec, role: Role) -> Json:
    asked: Resources = spec.compute.resources if role == "train" else spec.prepare.resources
    found: Json = {
        "requests": dict(asked.requests or {}),
        "limits": dict(asked.limits or {}),
    }
    if role == "train" and spec.compute.gpus_per_node:
        found["limits"][spec.compute.gpu_resource_name] = str(spec.compute.gpus_per_node)
    return {k: v for k, v in found.items() if v}


def _env(subject: Subject, run: CurrentRun, role: Role, config: Config) -> Iterator[Json]:
    spec = run.order.spec
    plain = {
        names.ENV_ORDER: names.ORDER_PATH,
        names.ENV_PVC_ROOT: names.PVC_ROOT,
        names.ENV_SCRATCH: names.SCRATCH,
        names.ENV_TERMINATION: names.TERMINATION_PATH,
        names.ENV_GRACE_SECONDS: str(GRACE_SECONDS),
        "HOME": names.SCRATCH,
        "TMPDIR": "/tmp",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **{key: f"{names.SCRATCH}/{folder}" for key, folder in _CACHES.items()},
    }
    if role == "train":
        gang = child_name(subject.name, run.id, "train", run.revision)
        plain |= {
            names.ENV_NODES: str(spec.compute.nodes),
            names.ENV_PROCESSES: str(spec.compute.effective_processes_per_node),
            names.ENV_RENDEZVOUS: f"{gang}-0.{gang}:{names.RENDEZVOUS_PORT}",
            names.ENV_METRICS_PORT: str(names.METRICS_PORT),
            # torch 2.15: without it a replaced agent deadlocks the re-formed gang.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "NCCL_DEBUG": "WARN",
        }
    if _keeps_models(role, config):
        plain[names.ENV_MODEL_CACHE] = names.MODEL_CACHE
    for key in sorted(plain):
        yield {"name": key, "value": plain[key]}
    yield _field(names.ENV_POD, "metadata.name")
    yield _field(names.ENV_NODE, "spec.nodeName")
    if role == "train":
        yield _field(names.ENV_NODE_RANK, f"metadata.annotations['{INDEX_ANNOTATION}']")
    yield from _storage_env(run.order)


def _field(name: str, path: str) -> Json:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _storage_env(order: RunOrder) -> Iterator[Json]:
    """Credentials by reference: the operator never reads a Secret."""
    for number, profile in enumerate(order.storage_profiles):
        if profile.secret_ref is None:
            continue
        for key, required in names.SECRET_KEYS.items():
            reference: Json = {"name": profile.secret_ref.name, "key": key}
            if not required:
                reference["optional"] = True
            yield {
                "name": names.storage_env(number, key),
                "valueFrom": {"secretKeyRef": reference},
            }


def claims(order: RunOrder) -> list[str]:
    """Volume claims that ``pvc://claim/path`` sources name, sorted."""
    data = order.spec.data
    uris = [order.base_model.source]
    if order.base is not None and order.base.beneath is not None:
        uris.append(order.base.beneath.source)
    uris += [s.source for s in [*data.train, *(data.validation or []), *(data.test or [])]]
    return sorted({m[1] for u in uris if (m := re.match(r"pvc://([^/]+)", u))})


def _keeps_models(role: Role, config: Config) -> bool:
    """Whether a pod has the node's folder of models: the gang's, which is worth the wait."""
    return role == "train" and config.model_cache is not None


def _mounts(order: RunOrder, role: Role, config: Config) -> list[Json]:
    mounts: list[Json] = [
        {"name": "order", "mountPath": names.ORDER_PATH.rpartition("/")[0], "readOnly": True},
        {"name": "scratch", "mountPath": names.SCRATCH},
        {"name": "termination", "mountPath": names.TERMINATION_PATH.rpartition("/")[0]},
        {"name": "tmp", "mountPath": "/tmp"},
    ]
    if role == "train":
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    if _keeps_models(role, config):
        mounts.append({"name": "model-cache", "mountPath": names.MODEL_CACHE})
    for number, claim in enumerate(claims(order)):
        path = f"{names.PVC_ROOT}/{claim}"
        mounts.append({"name": f"pvc-{number}", "mountPath": path, "readOnly": True})
    return mounts


def _volumes(subject: Subject, run: CurrentRun, role: Role, config: Config) -> list[Json]:
    volumes: list[Json] = [
        {
            "name": "order",
            "configMap": {"name": order_name(subject.name, run.id, run.revision)},
        },
        {"name": "scratch", "emptyDir": {}},
        {"name": "termination", "emptyDir": {}},
        {"name": "tmp", "emptyDir": {}},
    ]
    if role == "train":
        size = run.order.spec.compute.shared_memory
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": size}})
    if _keeps_models(role, config):
        path = {"path": config.model_cache, "type": "DirectoryOrCreate"}
        volumes.append({"name": "model-cache", "hostPath": path})
    for number, claim in enumerate(claims(run.order)):
        source = {"claimName": claim, "readOnly": True}
        volumes.append({"name": f"pvc-{number}", "persistentVolumeClaim": source})
    return volumes
