"""Fixtures: helm, and a separate control plane, because the chart's objects must not exist yet."""

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
    """Run helm and return its output; raises RuntimeError with its error output."""
    done = subprocess.run([binary("helm"), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr + done.stdout)
    return done.stdout


def render(*sets: str, namespace: str = "finetune-system") -> list[Object]:
    """Render the chart with ``--set`` values; return its objects."""
    return [found for found in yaml.safe_load_all(_template(namespace, sets)) if found]


@lru_cache
def _template(namespace: str, sets: tuple[str, ...]) -> str:
    values = [part for value in sets for part in ("--set", value)]
    place = ("--namespace", namespace, "--kube-version", "v1.36.0")
    return helm("template", "rel", CHART, *place, *values)


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [found for found in objects if found["kind"] == kind]


def one(objects: list[Object], kind: str, suffix: str = "") -> Object:
    """Return the only object of a kind whose name ends with ``suffix``."""
    (found,) = (o for o in of_kind(objects, kind) if o["metadata"]["name"].endswith(suffix))
    return found


@pytest.fixture(scope="session")
def plane() -> Iterator[ControlPlane]:
    with ControlPlane() as started:
        yield started
