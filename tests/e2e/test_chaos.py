"""``make chaos``: every scenario of ``chaos.SCENARIOS`` on the real cluster. Its short form in
``make e2e`` are ``test_disruptions`` and ``test_run``.

The losses of all logged steps equal those of an undisturbed run: a sample that was trained twice or
left out would change the loss of its step. The table, and what kubectl showed meanwhile, are
written to ``.finetune/chaos``.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from chaos import SCENARIOS, Place, Scenario
from e2e_platform import Platform

from cluster.real import RealCluster

ASKED = os.environ.get("FINETUNE_CHAOS") == "1"
pytestmark = [pytest.mark.e2e, pytest.mark.skipif(not ASKED, reason="make chaos")]

ROOT = Path(__file__).resolve().parents[2]
OUT = Path(os.environ.get("FINETUNE_CHAOS_OUT", ROOT / ".finetune/chaos"))
SPEC: dict[str, Any] = {
    "evaluation": {"maxSamples": 20},
    "checkpoint": {"everySteps": 5},
}
HEAD = "| disturbance | times | longest pause | more GPU-seconds | restarts, faults | losses |"
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
    def make(name: str, steps: int, **spec: Any) -> dict[str, Any]:
        # Each time: a kubelet that has started since has forgotten them.
        gpus = {"gpusPerNode": 1, "gpuResourceName": platform.advertise_gpus()}
        compute = gpus | spec.pop("compute", {})
        training = {"epochs": None, "maxSteps": steps}
        made: dict[str, Any] = manifest_of(name, compute=compute, training=training, **SPEC, **spec)
        return made

    return make


@pytest.fixture(scope="module")
def undisturbed(platform: Platform, chaos_manifest: Any) -> Callable[[int, int], Undisturbed]:
    """``undisturbed(steps, nodes)``: a run of that length on that many nodes."""

    @cache
    def train(steps: int, nodes: int) -> Undisturbed:
        name = f"undisturbed-{steps}-{nodes}"
        platform.apply(chaos_manifest(name, steps, compute={"nodes": nodes}))
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


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.id)
def test_a_disturbed_run_ends_like_an_undisturbed_one(
    platform: Platform, own_cluster: RealCluster, chaos_manifest: Any,
    undisturbed: Callable[[int, int], Undisturbed], table: Table, scenario: Scenario,
) -> None:  # fmt: skip
    without = undisturbed(scenario.steps, scenario.spec.get("compute", {}).get("nodes", 2))
    name = f"chaos-{scenario.id}"[:50].rstrip("-")
    place = Place(platform, own_cluster, name)
    with place.after:
        platform.apply(chaos_manifest(name, scenario.steps, **scenario.spec))
        watch = Watch(platform, name)
        watch.start()
        place.after.callback(watch.end)
        for _ in range(scenario.times):
            disturb(place, scenario)
        status = platform.wait(name, "Complete", within=900)
    losses = curve(platform, name, status)
    last = scenario.compared or scenario.steps
    worst = max(abs(losses[s] - loss) for s, loss in without.losses.items() if s <= last)
    lost = status["usage"]["gpuSeconds"] - without.gpu_seconds
    counts = f"{status['restarts']}, {status['faults']}"
    table.add(scenario.what, scenario.times, f"{watch.pause:.0f} s", lost, counts, f"{worst:.1e}")
    assert losses.keys() == without.losses.keys()
    assert worst <= 1e-4
    assert scenario.faults in (None, status["faults"])
    assert status["restarts"] >= scenario.restarts
    assert status["run"]["number"] == 1
    platform.delete(name)


def disturb(place: Place, scenario: Scenario) -> None:
    """Disturb a run, and wait until it goes on."""
    platform, name = place.platform, place.name
    if scenario.phase != "Training":
        place.phase(scenario.phase)
        scenario.act(place)
        return
    step = platform.wait_for_step(name, 10, within=600)["progress"]["step"]
    scenario.act(place)
    platform.wait_for_step(name, step + 5, within=600)


class Watch(threading.Thread):
    """Looks at a job once a second: what a user sees, and how its steps advance."""

    def __init__(self, platform: Platform, name: str) -> None:
        super().__init__(daemon=True)
        self._platform, self._name = platform, name
        self._over = threading.Event()
        self.lines = list[str]()
        """Each line of ``kubectl get``, without the age, and the messages beside it."""
        self.pause = 0.0
        """Longest time without a new step, in seconds."""
        self._step, self._since = 0, 0.0

    def run(self) -> None:
        while not self._over.wait(1):
            try:
                told = self._platform.kubectl("get", "finetunejob", self._name, "--no-headers")
                status = self._platform.status(self._name)
            except RuntimeError as error:
                self._add(str(error))
                continue
            self._count(status.get("progress", {}), time.monotonic())
            shown = [
                c["message"]
                for c in status.get("conditions", [])
                if c["type"] in ("Running", "Ready")
            ]
            text = told.strip().rsplit(maxsplit=1)[0]  # without the age
            self._add(text + "".join(f"\n    {message}" for message in dict.fromkeys(shown)))

    def _add(self, text: str) -> None:
        if not self.lines or self.lines[-1] != text:
            self.lines.append(text)

    def _count(self, progress: dict[str, Any], now: float) -> None:
        if progress.get("step", 0) > self._step:
            if self._step:
                self.pause = max(self.pause, now - self._since)
            self._step, self._since = progress["step"], now

    def end(self) -> None:
        """Stop, and write what was seen to a file."""
        self._over.set()
        self.join(30)
        OUT.mkdir(parents=True, exist_ok=True)
        described = self._platform.kubectl("describe", "finetunejob", self._name)
        (OUT / f"{self._name}.txt").write_text("\n".join([*self.lines, "", described]))
