"""Merge ``compute.podTemplate`` into the pods that the operator renders.
``finetune_api.podtemplate`` defines which fields a template may contain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

CPU_STAGE_FIELDS: Final = frozenset(
    {"containers", "dnsConfig", "dnsPolicy", "hostAliases", "imagePullSecrets", "volumes"}
)
"""Template fields that apply to CPU stages: pull secrets, DNS, environment and volumes (proxies, CA
bundles), but not the gang's node selection and resources."""


def for_cpu_stage(template: dict[str, Any]) -> dict[str, Any]:
    """The part of a template that applies to CPU stages. Labels and annotations do: workload
    identity and service meshes read them."""
    spec = {k: v for k, v in (template.get("spec") or {}).items() if k in CPU_STAGE_FIELDS}
    if "containers" in spec:
        kept = ("name", "env", "volumeMounts", "imagePullPolicy")
        spec["containers"] = [{k: v for k, v in c.items() if k in kept} for c in spec["containers"]]
    return {"metadata": template.get("metadata") or {}, "spec": spec}


def lay_over(base: Any, top: Any) -> Any:
    """Merge ``top`` into ``base``: maps are merged; list items are merged by ``name`` (mounts by
    ``mountPath``) or else appended; all other values are replaced."""
    if isinstance(base, dict) and isinstance(top, dict):
        merged = dict(base)
        for key, value in top.items():
            merged[key] = lay_over(base[key], value) if key in base else value
        return merged
    if isinstance(base, list) and isinstance(top, list):
        return _lay_list(base, top)
    return top


def _lay_list(base: list[Any], top: list[Any]) -> list[Any]:
    merged = list(base)
    for item in top:
        key = _key(item)
        places = [i for i, old in enumerate(merged) if key is not None and _key(old) == key]
        if places:
            merged[places[0]] = _lay_item(merged[places[0]], item)
        elif item not in merged:
            merged.append(item)
    return merged


def _lay_item(old: Any, new: Any) -> Any:
    # Replace an environment variable whole: `value` and `valueFrom` exclude each other.
    return new if {"value", "valueFrom"} & new.keys() else lay_over(old, new)


def _key(item: Any) -> tuple[str, Any] | None:
    if not isinstance(item, dict):
        return None
    field = "mountPath" if "mountPath" in item else "name"
    return (field, item[field]) if field in item else None


def without_nodes(template: dict[str, Any], nodes: Sequence[str]) -> dict[str, Any]:
    """The template with pods that are placed on none of these nodes. Terms of a node selector are
    alternatives, so each of the template's own gets the requirement."""
    if not nodes:
        return template
    # The API server allows one value a requirement here.
    fields = [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in nodes]
    affinity = dict(template["spec"].get("affinity") or {})
    placed = dict(affinity.get("nodeAffinity") or {})
    required = "requiredDuringSchedulingIgnoredDuringExecution"
    terms = (placed.get(required) or {}).get("nodeSelectorTerms") or [{}]
    placed[required] = {
        "nodeSelectorTerms": [
            {**term, "matchFields": [*(term.get("matchFields") or []), *fields]} for term in terms
        ]
    }
    affinity["nodeAffinity"] = placed
    return {**template, "spec": {**template["spec"], "affinity": affinity}}
