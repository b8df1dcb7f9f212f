"""Render plans to Kubernetes objects: pure and deterministic."""

from __future__ import annotations

from finetune_api import names
from finetune_api.identity import child_name, run_spec_name
from finetune_operator.children.jobs import stage_job
from finetune_operator.children.metadata import Json, labels_of, metadata, selector_of
from finetune_operator.children.network_policy import run_policy
from finetune_operator.config import ANNOTATION_IMAGE, Config
from finetune_operator.decision.plan import Create, CurrentRun, Plan, Subject
from finetune_operator.decision.stages import GANG


def render(plan: Plan, config: Config) -> list[Json]:
    """The objects that a plan creates, in apply order."""
    if plan.run is None:
        return []
    return [_render(plan.subject, plan.run, create, config) for create in plan.create]


def _render(subject: Subject, run: CurrentRun, create: Create, config: Config) -> Json:
    if create.kind == "ConfigMap":
        return run_spec_config_map(subject, run)
    if create.kind == "NetworkPolicy":
        assert config.network is not None
        return run_policy(subject, run, config.network)
    assert create.role is not None
    if create.kind == "Service":
        return gang_service(subject, run)
    return stage_job(subject, run, create.role, config)


def run_spec_config_map(subject: Subject, run: CurrentRun) -> Json:
    """The immutable ConfigMap with the run spec. Later spec changes are compared with it."""
    name = run_spec_name(subject.name, run.id, run.revision)
    meta = metadata(subject, name, labels_of(subject, run, None))
    meta["annotations"] = {ANNOTATION_IMAGE: run.image}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": meta,
        "immutable": True,
        "data": {names.RUN_SPEC_KEY: run.run_spec.to_text()},
    }


def gang_service(subject: Subject, run: CurrentRun) -> Json:
    """Headless Service that gives the gang's pods DNS names, also before they are ready."""
    labels = labels_of(subject, run, GANG)
    name = child_name(subject.name, run.id, GANG, run.revision)
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(subject, name, labels),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": selector_of(labels),
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
