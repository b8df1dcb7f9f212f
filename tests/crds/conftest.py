"""Fixtures: a real API server with the CRD installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from kubernetes import client, config

from cluster.api import Api, eventually
from finetune_api.crd import crd
from finetune_api.names import API_VERSION, GROUP, KIND, PLURAL, VERSION

Create = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.fixture(scope="session")
def installed(control_plane: Api) -> Api:
    """Control plane that serves FineTuneJobs."""
    definition = crd()
    control_plane.apply(definition)
    name = definition["metadata"]["name"]

    def established() -> bool:
        # Not kubectl wait: it fails while the CRD has no conditions.
        conditions = control_plane.get("crd", name).get("status", {}).get("conditions") or []
        return any(c["type"] == "Established" and c["status"] == "True" for c in conditions)

    eventually("the CRD is established", established)
    return control_plane


@pytest.fixture(scope="session")
def create(installed: Api) -> Create:
    """Return a function that dry-runs the creation of a job, with strict field validation as in
    kubectl, and returns the stored spec. It raises ValueError with the API server's message."""
    connection: client.ApiClient = config.new_client_from_config(  # type: ignore[no-untyped-call]
        str(installed.kubeconfig)
    )
    api = client.CustomObjectsApi(connection)

    def post(spec: dict[str, Any]) -> dict[str, Any]:
        body = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "job"}, "spec": spec}
        try:
            answer: Any = api.create_namespaced_custom_object(
                GROUP, VERSION, "default", PLURAL, body, dry_run="All", field_validation="Strict"
            )
        except client.ApiException as error:
            raise ValueError(json.loads(error.body or "{}")["message"]) from None
        stored: dict[str, Any] = answer["spec"]
        return stored

    return post
