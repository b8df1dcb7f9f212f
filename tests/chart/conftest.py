"""helm, and a cluster of the chart's own: what it installs must not be there already."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.build import binary
from cluster.control_plane import ControlPlane

CHART = Path(__file__).resolve().parents[2] / "charts/finetune-operator"

Object = dict[str, Any]


def helm(*arguments: str | Path) -> str:
    """What helm prints; raises RuntimeError with what it complained of."""
    done = subprocess.run([binary("helm"), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr + done.stdout)
    return done.stdout


def render(*sets: str, namespace: str = "finetune-system") -> list[Object]:
    """The chart's objects with ``--set`` values."""
    return [found for found in yaml.safe_load_all(_template(namespace, sets)) if found]


@lru_cache
def _template(namespace: str, sets: tuple[str, ...]) -> str:
    values = [part for value in sets for part in ("--set", value)]
    place = ("--namespace", namespace, "--kube-version", "v1.36.0")
    return helm("template", "rel", CHART, *place, *values)


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [found for found in objects if found["kind"] == kind]


def one(objects: list[Object], kind: str, suffix: str = "") -> Object:
    """The one object of a kind (whose name ends so)."""
    (found,) = (o for o in of_kind(objects, kind) if o["metadata"]["name"].endswith(suffix))
    return found


@pytest.fixture(scope="session")
def plane() -> Iterator[ControlPlane]:
    with ControlPlane() as started:
        yield started
