"""The schema is structural, bounded and described, and a real API server accepts the CRD."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest
from pydantic import Field

import finetune_operator
from cluster.api import Api, eventually
from crds.spec_rows import MINIMAL
from finetune_api import meanings
from finetune_api.base import Model
from finetune_api.crd import columns, crd
from finetune_api.names import API_VERSION, KIND, Condition, Phase
from finetune_api.schema import structural
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus

FORBIDDEN = {
    "$ref", "$defs", "title", "const", "anyOf", "allOf", "oneOf", "not", "exclusiveMinimum",
    "exclusiveMaximum", "propertyNames", "additionalItems", "uniqueItems", "nullable",
}  # fmt: skip


def nodes(schema: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from nodes(schema[key], f"{path}[]")


SPEC = dict(nodes(structural(FineTuneJobSpec, root="spec"), "spec"))
STATUS = dict(nodes(structural(FineTuneJobStatus, root="status", defaults=False), "status"))
ALL = {**SPEC, **STATUS}


@pytest.mark.parametrize("path", ALL)
def test_node_is_structural_and_bounded(path: str) -> None:
    node = ALL[path]
    assert not FORBIDDEN & node.keys()
    assert ("type" in node) != bool(node.get("x-kubernetes-int-or-string"))
    if node.get("type") == "string":
        assert {"maxLength", "enum"} & node.keys() or node["format"] == "date-time"
    if node.get("type") == "array":
        assert "maxItems" in node
    if isinstance(node.get("additionalProperties"), dict):
        assert "maxProperties" in node
        assert "properties" not in node


@pytest.mark.parametrize("path", [path for path in ALL if not path.endswith("]")])
def test_field_is_described(path: str) -> None:
    description = ALL[path]["description"]
    assert description[0] == "`" or description[0].isupper() or path.startswith("status")
    assert description.rstrip("`").endswith("."), description
    assert "\n" not in description


def test_a_status_has_no_defaults() -> None:
    assert not [path for path, node in STATUS.items() if "default" in node]


def test_pod_overrides_are_opaque() -> None:
    assert SPEC["spec.compute.podTemplate"]["x-kubernetes-preserve-unknown-fields"] is True


def test_block_defaults_include_field_defaults() -> None:
    """The API server runs a block's rules on its default before it defaults the fields."""
    assert SPEC["spec.data.split"]["default"] == {"validation": "0.05", "test": "0.05", "seed": 0}


class Unbounded(Model):
    name: str


class UnboundedMap(Model):
    labels: dict[str, bool]


class Exclusive(Model):
    share: Annotated[int, Field(gt=0)]


class Choice(Model):
    either: Annotated[str, Field(max_length=3)] | bool


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (Unbounded, r"spec\.name: give it maxLength"),
        (UnboundedMap, r"spec\.labels: give it maxProperties"),
        (Exclusive, r"spec\.share: the API server does not know exclusiveMinimum"),
        (Choice, r"spec\.either: the API server does not know anyOf"),
    ],
)
def test_fields_that_the_api_server_cannot_validate_are_refused(
    model: type[Model], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        structural(model, root="spec")


def test_every_status_value_has_a_description() -> None:
    assert set(meanings.CONDITIONS) == set(get_args(Condition))
    assert set(meanings.PHASES) == set(get_args(Phase))


def test_every_reason_of_the_operator_has_a_description() -> None:
    """Reasons are API: the reference must list every reason in the operator's sources."""
    operator = Path(finetune_operator.__file__).parent
    packages = [operator / package for package in ("decision", "status")]
    source = "".join(file.read_text() for package in packages for file in package.glob("*.py"))
    given = [
        r'conditions\.set\([^,]+, [^,*]+, "(\w+)"',
        r'_reconciling\([^,]+, "(\w+)"',
        r'Activity\([^,]+, "(\w+)"',
        r'return (?:"(?:True|False|Unknown)", )?"(?!True|False|Unknown)([A-Z]\w+)", ',
        r'Wait\("(\w+)"',
        r'Obstacle\(\s*"(\w+)"',
        r'reason = "(\w+)" if .* else "(?:\w+)"',
    ]
    found = {reason for pattern in given for reason in re.findall(pattern, source)}
    assert len(found) > 15 and {"ReferenceCycle", "GatesMissed"} <= found, "the patterns match"
    assert found <= set(meanings.REASONS), sorted(found - set(meanings.REASONS))


# --- on a real API server ------------------------------------------------------------------------


def test_the_api_server_accepts_the_crd(installed: Api) -> None:
    conditions = {
        c["type"]: c["status"]
        for c in installed.get("crd", crd()["metadata"]["name"])["status"]["conditions"]
    }
    assert conditions == {"NamesAccepted": "True", "Established": "True"}, "structural"


def test_kubectl_explains_fields(installed: Api) -> None:
    field = "finetunejob.spec.training.learningRate"
    text = eventually("the schema is published", lambda: installed.kubectl("explain", field))
    assert "Peak learning rate" in text


STATUS_OBJECT = {
    "observedGeneration": 1,
    "phase": "Training",
    "conditions": [
        {
            "type": "Running",
            "status": "True",
            "observedGeneration": 1,
            "lastTransitionTime": "2026-01-02T03:04:05Z",
            "reason": "GangRunning",
            "message": "2 of 2 pods run",
        }
    ],
    "run": {"id": "1-0f9c2", "number": 1, "revision": 1, "attempt": 1},
    "history": [],
    "progress": {
        "stage": "Training",
        "step": 40,
        "totalSteps": 120,
        "percent": 33,
        "epoch": "1.0",
        "loss": "1.234",
        "remaining": "2m10s",
        "lastUpdateTime": "2026-01-02T03:04:05Z",
    },
    "evaluation": [],
    "output": {"uri": "s3://models/tuned/1-0f9c2", "digest": "abc", "formats": ["adapter"]},
    "restarts": 1,
    "usage": {"gpuSeconds": 10, "goodput": "0.5", "queuedSeconds": 3},
    "startup": {"totalSeconds": 61, "prepareSeconds": 20, "pullSeconds": 9, "importSeconds": 8},
    "failure": {"class": "Diverged", "reason": "LossNotFinite", "message": "step 41"},
}


def test_status_is_stored_and_printed(installed: Api) -> None:
    metadata = {"name": "status", "namespace": "default"}
    job = {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": MINIMAL}
    installed.apply(job)
    try:
        status = FineTuneJobStatus.model_validate(STATUS_OBJECT)
        patch = json.dumps({"status": status.to_json()})
        installed.kubectl(
            "patch", "ftj", "status", "--subresource=status", "--type=merge", "--patch", patch
        )
        stored = installed.get("finetunejob", "status")
        assert stored["status"] == status.to_json()
        head, row = installed.kubectl("get", "finetunejobs", "status").splitlines()
        narrow = [c["name"].upper() for c in columns() if not c.get("priority")]
        assert head.split() == ["NAME", *narrow]
        assert row.split()[:-1] == ["status", "Training", "40", "120", "1.234", "2m10s"]
        wide = installed.kubectl("get", "ftj", "status", "-o", "wide")
        assert "s3://models/tuned/1-0f9c2" in wide
    finally:
        installed.kubectl("delete", "finetunejob", "status", "--wait=false")
