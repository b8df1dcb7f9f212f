"""``make chaos``: every scenario of ``chaos.SCENARIOS`` on the real cluster; ``make e2e`` tries
some, with shorter outages.

The losses of all logged steps equal those of an undisturbed run: a sample that was trained twice or
left out would change the loss of its step. The table, and what kubectl showed meanwhile, are
written to ``.finetune/chaos``.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from chaos import SCENARIOS, Place, Scenario
from e2e_platform import Platform

from cluster.api import eventually
from cluster.real import RealCluster

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
FULL = os.environ.get("FINETUNE_CHAOS") == "1"
OUT = Path(os.environ.get("FINETUNE_CHAOS_OUT", ROOT / ".finetune/chaos"))
SPEC: dict[str, Any] = {
    "evaluation": {"maxSamples": 20},
    "checkpoint": {"everySteps": 5},
}
GPUS = 2
HEAD = "| disturbance | times | recovered after | more GPU-seconds | restarts, faults | losses |"
RULE = "|---|---|---|---|---|---|"


@dataclass
class Table:
    """The rows so far."""

    rows: list[str] = field(default_factory=list)

    def add(self, *cells: object) -> None:
        self.rows.append("| " + " | ".join(map(str, cells)) + " |")
        OUT.mkdir(parents=True, exist_ok=True)
        (OUT / "table.md").write_text("\n".join([HEAD, RULE, *self.rows]) + "\n")
        print(self.rows[-1], flush=True)


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing disturbs."""

    losses: dict[int, float]
    """By step."""
    gpu_seconds: float


@pytest.fixture(scope="module")
def table() -> Table:
    return Table()


@pytest.fixture(scope="module")
def chaos_manifest(platform: Platform, manifest_of: Any) -> Callable[..., dict[str, Any]]:
    gpus = {"gpusPerNode": 1, "gpuResourceName": platform.advertise_gpus()}

    def make(name: str, steps: int, **spec: Any) -> dict[str, Any]:
        compute = gpus | spec.pop("compute", {})
        training = {"epochs": None, "maxSteps": steps}
        made: dict[str, Any] = manifest_of(name, compute=compute, training=training, **SPEC, **spec)
        return made

    return make


@pytest.fixture(scope="module")
def undisturbed(platform: Platform, chaos_manifest: Any) -> Callable[[int], Undisturbed]:
    """``undisturbed(steps)``: a run of that length."""

    @cache
    def train(steps: int) -> Undisturbed:
        name = platform.apply(chaos_manifest(f"undisturbed-{steps}", steps))
        status = platform.wait(name, "Complete", within=900)
        losses = curve(platform, name, status)
        platform.delete(name)
        return Undisturbed(losses, status["usage"]["gpuSeconds"])

    return train


def curve(platform: Platform, name: str, status: dict[str, Any]) -> dict[int, float]:
    uri = f"s3://output/{name}/.workspace/runs/{name}/{status['run']['id']}/result.json"
    points = json.loads(platform.store.get(uri))["curve"]
    steps = [p["step"] for p in points]
    assert steps == sorted(set(steps)), "each step once"
    return {p["step"]: p["loss"] for p in points}


@pytest.mark.parametrize(
    "scenario",
    [s for s in SCENARIOS if FULL or s.in_e2e],
    ids=lambda s: s.id,
)
def test_a_disturbed_run_ends_like_an_undisturbed_one(
    platform: Platform, own_cluster: RealCluster, chaos_manifest: Any,
    undisturbed: Callable[[int], Undisturbed], table: Table, scenario: Scenario,
) -> None:  # fmt: skip
    without = undisturbed(scenario.steps)
    name = f"chaos-{scenario.id}"[:50].rstrip("-")
    place = Place(platform, own_cluster, name, FULL)
    with watched(platform, name), place.after:
        platform.apply(chaos_manifest(name, scenario.steps, **scenario.spec))
        seconds = [disturb(place, scenario) for _ in range(scenario.times)]
        status = platform.wait(name, "Complete", within=900)
    losses = curve(platform, name, status)
    worst = max(abs(losses[step] - loss) for step, loss in without.losses.items())
    lost = status["usage"]["gpuSeconds"] - without.gpu_seconds
    took = ", ".join(f"{s:.0f} s" for s in seconds)
    counts = f"{status['restarts']}, {status['faults']}"
    table.add(scenario.what, scenario.times, took, lost, counts, f"{worst:.1e}")
    assert losses.keys() == without.losses.keys()
    assert worst <= 1e-4
    assert scenario.faults in (None, status["faults"])
    assert status["run"]["number"] == 1
    platform.delete(name)


def disturb(place: Place, scenario: Scenario) -> float:
    """Disturb a run; return the seconds until it goes on."""
    platform, name = place.platform, place.name
    if scenario.phase == "Training":
        before = platform.wait_for_step(name, 10, within=600)["progress"]["step"]
    else:
        place.phase(scenario.phase)
    began = time.monotonic()
    scenario.act(place)
    if scenario.phase == "Training":
        eventually("the run goes on", lambda: goes_on(platform, name, before), within=600)
    else:
        done = {"Preparing": "Prepared", "Publishing": "Published"}[scenario.phase]
        platform.wait(name, done, within=900)
    return time.monotonic() - began


def goes_on(platform: Platform, name: str, step: int) -> bool:
    status = platform.status(name)
    done = any(c["type"] == "Evaluated" and c["status"] == "True" for c in status["conditions"])
    return done or status.get("progress", {}).get("step", 0) > step


@contextmanager
def watched(platform: Platform, name: str) -> Iterator[None]:
    """Write what a user sees to a file: each change of the job's line, then its description."""
    over, lines = threading.Event(), list[str]()

    def look() -> None:
        while not over.wait(3):
            try:
                told = platform.kubectl("get", "finetunejob", name, "--no-headers")
                told = told.strip().rsplit(maxsplit=1)[0]  # without the age
                conditions = platform.status(name).get("conditions", [])
            except RuntimeError as error:
                told, conditions = str(error), []
            shown = [c["message"] for c in conditions if c["type"] in ("Running", "Ready")]
            text = told + "".join(f"\n    {message}" for message in dict.fromkeys(shown))
            if not lines or lines[-1] != text:
                lines.append(text)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join(30)
        OUT.mkdir(parents=True, exist_ok=True)
        described = platform.kubectl("describe", "finetunejob", name)
        (OUT / f"{name}.txt").write_text("\n".join([*lines, "", described]))
