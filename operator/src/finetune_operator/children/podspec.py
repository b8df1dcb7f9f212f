"""The pod of each stage: one container under the restricted pod security standard with a read-only
root filesystem. Writable folders are emptyDir volumes, apart from the optional model cache
(hostPath)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from finetune_api import names
from finetune_api.cluster import Resources
from finetune_api.identity import child_name, run_spec_name
from finetune_api.names import Role
from finetune_api.run_spec import RunSpec
from finetune_api.spec import FineTuneJobSpec
from finetune_operator.children.metadata import Json
from finetune_operator.children.overlay import for_cpu_stage, lay_over, without_nodes
from finetune_operator.config import GRACE_SECONDS, NODE_LOST_SECONDS, USER_ID, Config
from finetune_operator.decision.plan import CurrentRun, Subject
from finetune_operator.decision.stages import GANG
from finetune_operator.world.pods import INDEX_ANNOTATION

_CACHES: Final = {
    "HF_HOME": "huggingface",
    "XDG_CACHE_HOME": "cache",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "CUDA_CACHE_PATH": "cuda",
}
"""Cache folders of libraries, below SCRATCH, by environment variable."""
_DO_NOT_DISRUPT: Final = {
    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
    "karpenter.sh/do-not-disrupt": "true",
}
"""Annotations of pods that autoscalers leave in place."""


@dataclass(frozen=True)
class StagePod:
    """Inputs from which the pod of a stage is rendered."""

    subject: Subject
    run: CurrentRun
    role: Role
    arguments: list[str]
    labels: dict[str, str]
    config: Config

    @property
    def run_spec(self) -> RunSpec:
        return self.run.run_spec

    @property
    def spec(self) -> FineTuneJobSpec:
        return self.run.run_spec.spec

    @property
    def in_gang(self) -> bool:
        return self.role == GANG

    @property
    def gang_name(self) -> str:
        """Name of the gang's Job and Service."""
        return child_name(self.subject.name, self.run.id, GANG, self.run.revision)

    @property
    def grace_seconds(self) -> int:
        return self.run.grace_seconds if self.in_gang else GRACE_SECONDS

    @property
    def caches_models(self) -> bool:
        """Whether the pod mounts the node's cache of base models. Only the gang does: it holds GPUs
        while it waits for weights."""
        return self.in_gang and self.config.model_cache is not None


def pod_template(pod: StagePod) -> Json:
    """Pod template of a stage, with ``compute.podTemplate`` merged into it."""
    base: Json = {"metadata": {"labels": pod.labels}, "spec": _pod_spec(pod)}
    if pod.in_gang and pod.spec.scheduling.disruption == "DoNotDisrupt":
        base["metadata"]["annotations"] = dict(_DO_NOT_DISRUPT)
    overlay = pod.spec.compute.pod_template or {}
    laid: Json = lay_over(base, overlay if pod.in_gang else for_cpu_stage(overlay))
    return without_nodes(laid, pod.run.avoid_nodes) if pod.in_gang else laid


def _pod_spec(pod: StagePod) -> Json:
    spec = pod.spec
    rendered: Json = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": pod.grace_seconds,
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
        "containers": [_container(pod)],
        "volumes": _volumes(pod),
    }
    if spec.storage.service_account_name is not None:
        rendered["serviceAccountName"] = spec.storage.service_account_name
    if spec.scheduling.priority_class_name is not None:
        rendered["priorityClassName"] = spec.scheduling.priority_class_name
    if pod.in_gang:
        rendered |= _gang_placement(pod)
    else:
        rendered["tolerations"] += [t.to_json() for t in spec.prepare.tolerations or []]
        if spec.prepare.node_selector:
            rendered["nodeSelector"] = dict(spec.prepare.node_selector)
    return rendered


def _gang_placement(pod: StagePod) -> Json:
    placement: Json = {
        "subdomain": pod.gang_name,
        # Prefer one pod per node.
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {
                    "matchLabels": {
                        k: pod.labels[k]
                        for k in (names.LABEL_JOB_UID, names.LABEL_RUN, names.LABEL_ROLE)
                    }
                },
            }
        ],
    }
    if pod.spec.scheduling.scheduler_name is not None:
        placement["schedulerName"] = pod.spec.scheduling.scheduler_name
    return placement


def _container(pod: StagePod) -> Json:
    container: Json = {
        "name": names.CONTAINER,
        "image": pod.run.image,
        "args": pod.arguments,
        "env": list(_env(pod)),
        "resources": _resources(pod),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePath": names.TERMINATION_PATH,
        "terminationMessagePolicy": "File",
        "volumeMounts": _mounts(pod),
    }
    if pod.config.image_pull_policy is not None:
        container["imagePullPolicy"] = pod.config.image_pull_policy
    if pod.in_gang:
        container["ports"] = [
            {"name": names.METRICS_PORT_NAME, "containerPort": names.METRICS_PORT},
            {"name": names.RENDEZVOUS_PORT_NAME, "containerPort": names.RENDEZVOUS_PORT},
        ]
    return container


def _resources(pod: StagePod) -> Json:
    compute = pod.spec.compute
    asked: Resources = compute.resources if pod.in_gang else pod.spec.prepare.resources
    found: Json = {
        "requests": dict(asked.requests or {}),
        "limits": dict(asked.limits or {}),
    }
    if pod.in_gang and compute.gpus_per_node:
        found["limits"][compute.gpu_resource_name] = str(compute.gpus_per_node)
    return {k: v for k, v in found.items() if v}


# --- environment -------------------------------------------------------------------------------


def _env(pod: StagePod) -> Iterator[Json]:
    plain = {
        names.ENV_RUN_SPEC: names.RUN_SPEC_PATH,
        names.ENV_PVC_ROOT: names.PVC_ROOT,
        names.ENV_SCRATCH: names.SCRATCH,
        names.ENV_TERMINATION: names.TERMINATION_PATH,
        names.ENV_GRACE_SECONDS: str(pod.grace_seconds),
        "HOME": names.SCRATCH,
        "TMPDIR": "/tmp",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **{key: f"{names.SCRATCH}/{folder}" for key, folder in _CACHES.items()},
    }
    if pod.in_gang:
        plain |= _gang_env(pod)
    if pod.caches_models:
        plain[names.ENV_MODEL_CACHE] = names.MODEL_CACHE
    for key in sorted(plain):
        yield {"name": key, "value": plain[key]}
    if pod.in_gang:
        yield _field(names.ENV_NODE_RANK, f"metadata.annotations['{INDEX_ANNOTATION}']")
    yield from _storage_env(pod.run_spec)
    yield from _judge_env(pod)


def _gang_env(pod: StagePod) -> dict[str, str]:
    compute, gang = pod.spec.compute, pod.gang_name
    return {
        names.ENV_NODES: str(compute.nodes),
        names.ENV_PROCESSES: str(compute.effective_processes_per_node),
        names.ENV_RENDEZVOUS: f"{gang}-0.{gang}:{names.RENDEZVOUS_PORT}",
        names.ENV_METRICS_PORT: str(names.METRICS_PORT),
        # torch 2.15: without this, a replaced agent deadlocks the gang at the next rendezvous.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "NCCL_DEBUG": "WARN",
    }


def _field(name: str, path: str) -> Json:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _storage_env(run_spec: RunSpec) -> Iterator[Json]:
    """Secret references for credentials: the operator never reads a Secret."""
    for number, profile in enumerate(run_spec.storage_profiles):
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


def _judge_env(pod: StagePod) -> Iterator[Json]:
    """Secret reference for the judge's key, in the only stage that asks it."""
    judge = pod.spec.evaluation.judge
    if pod.role == "publish" and judge is not None and judge.secret_ref is not None:
        reference = {"name": judge.secret_ref.name, "key": names.JUDGE_SECRET_KEY}
        yield {"name": names.ENV_JUDGE_KEY, "valueFrom": {"secretKeyRef": reference}}


# --- volumes -----------------------------------------------------------------------------------


def claims(run_spec: RunSpec) -> list[str]:
    """Volume claims named by ``pvc://claim/path`` sources, sorted."""
    uris = [run_spec.base_model.source]
    if run_spec.base is not None and run_spec.base.beneath is not None:
        uris.append(run_spec.base.beneath.source)
    uris += [source.source for source in run_spec.spec.data.sources()]
    return sorted({m[1] for u in uris if (m := re.match(r"pvc://([^/]+)", u))})


def _mounts(pod: StagePod) -> list[Json]:
    mounts: list[Json] = [
        {"name": "run-spec", "mountPath": names.RUN_SPEC_PATH.rpartition("/")[0], "readOnly": True},
        {"name": "scratch", "mountPath": names.SCRATCH},
        {"name": "termination", "mountPath": names.TERMINATION_PATH.rpartition("/")[0]},
        {"name": "tmp", "mountPath": "/tmp"},
    ]
    if pod.in_gang:
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    if pod.caches_models:
        mounts.append({"name": "model-cache", "mountPath": names.MODEL_CACHE})
    for number, claim in enumerate(claims(pod.run_spec)):
        path = f"{names.PVC_ROOT}/{claim}"
        mounts.append({"name": f"pvc-{number}", "mountPath": path, "readOnly": True})
    return mounts


def _volumes(pod: StagePod) -> list[Json]:
    run = pod.run
    volumes: list[Json] = [
        {
            "name": "run-spec",
            "configMap": {"name": run_spec_name(pod.subject.name, run.id, run.revision)},
        },
        {"name": "scratch", "emptyDir": {}},
        {"name": "termination", "emptyDir": {}},
        {"name": "tmp", "emptyDir": {}},
    ]
    if pod.in_gang:
        size = pod.spec.compute.shared_memory
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": size}})
    if pod.caches_models:
        path = {"path": pod.config.model_cache, "type": "DirectoryOrCreate"}
        volumes.append({"name": "model-cache", "hostPath": path})
    for number, claim in enumerate(claims(pod.run_spec)):
        source = {"claimName": claim, "readOnly": True}
        volumes.append({"name": f"pvc-{number}", "persistentVolumeClaim": source})
    return volumes
