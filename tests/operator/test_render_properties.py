"""Any valid spec renders children that a real API server accepts, the same each time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from operator_world import World
from spec_strategy import specs
from test_render import ALL, LABEL, VALUE, rendered

from cluster.control_plane import ControlPlane

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
BATCH = 30
"""Specs of one request round to the API server."""


def children(made: dict[str, Any], name: str = "bot") -> list[dict[str, Any]]:
    world = World(name)
    world.job["spec"] = made
    return rendered(world, ALL)


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=SLOW)
@given(specs())
def test_children_are_named_within_limits_and_the_same_each_time(made: dict[str, Any]) -> None:
    objects = children(made)
    assert json.dumps(objects) == json.dumps(children(made))
    for obj in objects:
        meta = obj["metadata"]
        assert LABEL.match(meta["name"]) and len(meta["name"]) <= 63 - len("-1023")
        assert all(len(v) <= 63 and VALUE.match(v) for v in meta["labels"].values())


def paths(value: Any, path: str = "") -> Iterator[str]:
    """Dotted paths of the fields of a spec."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from paths(item, f"{path}.{key}")
    else:
        yield path


@pytest.fixture(scope="module")
def plane() -> Iterator[ControlPlane]:
    with ControlPlane() as plane:
        plane.kubectl("create", "namespace", "team")
        yield plane


def test_an_api_server_accepts_the_children_of_any_valid_spec(plane: ControlPlane) -> None:
    made: list[dict[str, Any]] = []

    @settings(max_examples=BATCH, derandomize=True, deadline=None, suppress_health_check=SLOW)
    @given(specs())
    def collect(found: dict[str, Any]) -> None:
        made.append(found)

    collect()
    assert len({path for each in made for path in paths(each)}) > 20, "specs of many shapes"
    objects = [obj for i, each in enumerate(made) for obj in children(each, f"job-{i}")]
    assert len(objects) >= 4 * BATCH
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    plane.kubectl("create", "--dry-run=server", "--validate=strict", "-f", "-", stdin=text)
