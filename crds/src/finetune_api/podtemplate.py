"""``spec.compute.podTemplate``: validation of its allowed fields.

The restrictions ensure that permission to create FineTuneJobs gives no more than pods under the
restricted Pod Security Standard would (plus IPC_LOCK, which RDMA needs): no host paths or host
namespaces, no other service account, no other command.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from finetune_api import names

_OUR_PREFIXES: Final = (f"{names.GROUP}/", "app.kubernetes.io/", "batch.kubernetes.io/")
_TEMPLATE_FIELDS: Final = frozenset({"metadata", "spec"})
_POD_FIELDS: Final = frozenset(
    {
        "affinity",
        "containers",
        "dnsConfig",
        "dnsPolicy",
        "hostAliases",
        "imagePullSecrets",
        "nodeSelector",
        "overhead",
        "preemptionPolicy",
        "runtimeClassName",
        "schedulingGates",
        "securityContext",
        "tolerations",
        "topologySpreadConstraints",
        "volumes",
    }
)
_POD_SECURITY: Final = frozenset({"fsGroup", "fsGroupChangePolicy", "supplementalGroups"})
_CONTAINER_FIELDS: Final = frozenset(
    {"env", "imagePullPolicy", "name", "resources", "securityContext", "volumeMounts"}
)
_CONTAINER_SECURITY: Final = frozenset({"capabilities"})
_CAPABILITIES: Final = frozenset({"IPC_LOCK"})
_VOLUME_TYPES: Final = frozenset(
    {"configMap", "emptyDir", "ephemeral", "name", "persistentVolumeClaim", "secret"}
)
_OUR_VOLUMES: Final = frozenset({"run-spec", "scratch", "tmp", "termination", "shm", "model-cache"})
_OUR_PATHS: Final = (
    "/etc/finetune", "/var/run/finetune", names.MODEL_CACHE, "/dev/shm", "/tmp",
)  # fmt: skip
_OUR_ENV: Final = ("FINETUNE_", "JOB_COMPLETION_INDEX", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE")
_ROOT: Final = "spec.compute.podTemplate"


def allowed_parts() -> dict[str, list[str]]:
    """Return the allowed fields by place, and the allowed capabilities, for the chart's admission
    policy, which refuses others before they are stored."""
    return {
        "template": sorted(_TEMPLATE_FIELDS),
        "pod": sorted(_POD_FIELDS),
        "podSecurityContext": sorted(_POD_SECURITY),
        "volume": sorted(_VOLUME_TYPES),
        "container": sorted(_CONTAINER_FIELDS),
        "containerSecurityContext": sorted(_CONTAINER_SECURITY),
        "capabilities": sorted(_CAPABILITIES),
    }


def template_problems(template: dict[str, Any] | None) -> list[str]:
    """Return one line per forbidden part of the template, with its path; empty if it is valid."""
    if template is None:
        return []
    faults: list[str] = []
    _allow(template, _TEMPLATE_FIELDS, _ROOT, faults)
    meta = _mapping(template.get("metadata", {}), f"{_ROOT}.metadata", faults)
    _allow(meta, frozenset({"annotations", "labels"}), f"{_ROOT}.metadata", faults)
    for part in ("annotations", "labels"):
        path = f"{_ROOT}.metadata.{part}"
        for key in _mapping(meta.get(part, {}), path, faults):
            if key.startswith(_OUR_PREFIXES) or key == names.LABEL_QUEUE:
                faults.append(f"{path}[{key}]: is the operator's own; use another key")
    spec = _mapping(template.get("spec", {}), f"{_ROOT}.spec", faults)
    _check_spec(spec, faults)
    return faults


def _check_spec(spec: dict[str, Any], faults: list[str]) -> None:
    path = f"{_ROOT}.spec"
    _allow(spec, _POD_FIELDS, path, faults)
    security = _mapping(spec.get("securityContext", {}), f"{path}.securityContext", faults)
    _allow(security, _POD_SECURITY, f"{path}.securityContext", faults)
    _each(spec, "volumes", path, faults, _check_volume)
    _each(spec, "containers", path, faults, _check_container)


def _check_volume(volume: dict[str, Any], path: str, faults: list[str]) -> None:
    name = str(volume.get("name", ""))
    if name in _OUR_VOLUMES or name.startswith("pvc-"):
        faults.append(f"{path}.name: {name!r} is a volume of the operator; use another name")
    _allow(volume, _VOLUME_TYPES, path, faults)


def _check_container(container: dict[str, Any], path: str, faults: list[str]) -> None:
    if container.get("name") != names.CONTAINER:
        faults.append(
            f"{path}.name: must be {names.CONTAINER!r}, the pod's only container; got"
            f" {container.get('name')!r}"
        )
    _allow(container, _CONTAINER_FIELDS, path, faults)
    security = _mapping(container.get("securityContext", {}), f"{path}.securityContext", faults)
    _allow(security, _CONTAINER_SECURITY, f"{path}.securityContext", faults)
    where = f"{path}.securityContext.capabilities"
    capabilities = _mapping(security.get("capabilities", {}), where, faults)
    _allow(capabilities, frozenset({"add"}), where, faults)
    for name in _list(capabilities, "add", where, faults):
        if not isinstance(name, str) or name not in _CAPABILITIES:
            faults.append(f"{where}.add: {name!r} is not allowed; allowed: IPC_LOCK")
    _each(container, "env", path, faults, _check_env)
    _each(container, "volumeMounts", path, faults, _check_mount)


def _check_env(item: dict[str, Any], path: str, faults: list[str]) -> None:
    if str(item.get("name", "")).startswith(_OUR_ENV):
        faults.append(f"{path}.name: {item.get('name')!r} is the operator's own")


def _check_mount(item: dict[str, Any], path: str, faults: list[str]) -> None:
    mount = str(item.get("mountPath", ""))
    if any(mount == p or mount.startswith(f"{p}/") for p in _OUR_PATHS):
        faults.append(f"{path}.mountPath: {mount!r} is the operator's own; mount it elsewhere")


def _each(
    parent: dict[str, Any],
    key: str,
    path: str,
    faults: list[str],
    check: Callable[[dict[str, Any], str, list[str]], None],
) -> None:
    for position, item in enumerate(_list(parent, key, path, faults)):
        where = f"{path}.{key}[{position}]"
        found = _mapping(item, where, faults)
        if found:
            check(found, where, faults)


def _list(parent: dict[str, Any], key: str, path: str, faults: list[str]) -> list[Any]:
    items = parent.get(key, [])
    if isinstance(items, list):
        return items
    faults.append(f"{path}.{key}: must be a list; got {type(items).__name__}")
    return []


def _mapping(value: Any, path: str, faults: list[str]) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    faults.append(f"{path}: must be a mapping; got {type(value).__name__}")
    return {}


def _allow(part: dict[str, Any], allowed: frozenset[str], path: str, faults: list[str]) -> None:
    for key in sorted(part.keys() - allowed):
        faults.append(f"{path}.{key}: not allowed; allowed here: {', '.join(sorted(allowed))}")
