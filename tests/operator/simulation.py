"""The operator's controller and store in a simulated cluster, with watches that lag.

Only events and timers cause passes, as in the process: a change that needs a pass which nothing
causes is a defect that ``converge`` shows.
"""

from __future__ import annotations

import asyncio
import importlib
import pkgutil
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, tzinfo
from typing import Any
from unittest import mock

from operator_world import CONFIG, spec
from simulated_api import NAMESPACE, Connection, Crash, Json, SimulatedApi
from simulated_nodes import SimulatedCluster, deleting, ended, phase_of, role_of

import finetune_operator
from finetune_api import names
from finetune_api.results import Progress
from finetune_operator import watch
from finetune_operator.controller import Controller
from finetune_operator.metrics import Metrics
from finetune_operator.store import Store
from finetune_operator.workqueue import FIRST_BACKOFF

NAME = "bot"


class Queue:
    """Keys to work on, and timers by the simulated clock."""

    def __init__(self, api: SimulatedApi) -> None:
        self._api = api
        self.ready: list[str] = []
        self.timers: dict[str, datetime] = {}
        self.new = 0

    def put(self, key: str) -> None:
        if key not in self.ready:
            self.ready.append(key)

    def put_after(self, key: str, seconds: float) -> None:
        due = self._api.now + timedelta(seconds=seconds)
        self.timers[key] = min(due, self.timers.get(key, due))

    def forget(self, key: str) -> None:
        self.timers.pop(key, None)

    def ring(self) -> None:
        """Put the keys whose time has come."""
        for key, due in list(self.timers.items()):
            if due <= self._api.now:
                del self.timers[key]
                self.put(key)


class Process:
    """One operator process: it has listed every kind, and watches from there."""

    def __init__(self, api: SimulatedApi) -> None:
        self.api = api
        self.store = Store()
        self.queue = Queue(api)
        self.connection = Connection(api)
        metrics = Metrics(self.store, lambda: 0)
        self._controller = Controller(
            self.store, self.connection, self.queue, CONFIG, metrics, "here"  # type: ignore[arg-type]
        )  # fmt: skip
        self.seen: dict[str, int] = {}
        """Number of events of each kind that have arrived."""
        for kind in watch.RESOURCES:
            self.list(kind)

    def list(self, kind: str) -> None:
        """Read all objects of a kind, as after an expired watch (410 Gone): the objects that are
        gone are not told."""
        self.seen[kind] = len(self.api.log[kind])
        for obj in self.api.of(kind):
            self._tell(kind, self.store.put(kind, obj), obj)

    def deliver(self, kind: str, count: int) -> None:
        """Let the next events of a watch arrive."""
        first = self.seen[kind]
        self.seen[kind] = min(first + count, len(self.api.log[kind]))
        for what, obj in self.api.log[kind][first : self.seen[kind]]:
            self._arrive(kind, what, obj)

    def repeat(self, kind: str) -> None:
        """The newest event of a watch arrives once more."""
        if self.seen[kind]:
            what, obj = self.api.log[kind][self.seen[kind] - 1]
            self._arrive(kind, what, obj)

    def behind(self) -> bool:
        return any(self.seen[kind] < len(log) for kind, log in self.api.log.items())

    def _arrive(self, kind: str, what: str, obj: Json) -> None:
        put = self.store.remove if what == "DELETED" else self.store.put
        self._tell(kind, put(kind, obj), obj)

    def _tell(self, kind: str, uid: str | None, obj: Json) -> None:
        for key in [*filter(None, [uid]), *self.store.affected(kind, obj)]:
            self.queue.put(key)

    def work(self) -> bool:
        """Work on the next key; return whether there was one."""
        self.queue.ring()
        if not self.queue.ready:
            return False
        key = self.queue.ready.pop(0)
        if not _run(self._controller.handle(key)):
            self.queue.put_after(key, FIRST_BACKOFF)
        return True

    def sweep(self) -> None:
        """Remove objects whose deletion no watch has told."""
        for kind in watch.RESOURCES:
            _run(watch._sweep_kind(
                self.connection, self.store, self.queue.put, kind, None  # type: ignore[arg-type]
            ))  # fmt: skip

    def poll(self, progress: Progress) -> None:
        for job in self.api.of(names.KIND):
            uid = job["metadata"]["uid"]
            self.store.put_progress(uid, progress, self.api.now)
            self.queue.put(uid)


def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine that waits for nothing but tasks of its own."""
    return _LOOP.run_until_complete(coroutine)


_LOOP = asyncio.new_event_loop()


class Simulation:
    """One FineTuneJob, its cluster and its operator."""

    def __init__(self, **more: Any) -> None:
        self.api = SimulatedApi()
        self.cluster = SimulatedCluster(self.api)
        meta = {"name": NAME, "namespace": NAMESPACE, "generation": 1}
        self.api.create(names.KIND, {"metadata": meta, "spec": spec(**more)})
        self.process = Process(self.api)

    # --- the user --------------------------------------------------------------------------------

    @property
    def job(self) -> Json:
        return self.api.objects[names.KIND, NAME]

    @property
    def status(self) -> Json:
        found: Json = self.job.get("status", {})
        return found

    @property
    def phase(self) -> str:
        return str(self.status.get("phase"))

    def edit(self, **more: Any) -> None:
        generation = self.job["metadata"]["generation"] + 1
        self.api.update(names.KIND, NAME, spec=more, metadata={"generation": generation})

    # --- the operator ----------------------------------------------------------------------------

    def work(self) -> bool:
        """One pass; a crash starts a new process."""
        try:
            return self.process.work()
        except Crash:
            self.restart()
            return True

    def restart(self) -> None:
        self.process = Process(self.api)

    # --- time and the rest of the world ----------------------------------------------------------

    def wait(self, seconds: float) -> None:
        self.api.now += timedelta(seconds=seconds)

    def report(self, step: int) -> None:
        """The operator reads the progress of a gang that runs."""
        gang = [p for p in self.cluster.running() if role_of(p) == "train" and not deleting(p)]
        if gang:
            raw = {"run": gang[0]["metadata"]["labels"][names.LABEL_RUN], "stage": "Training"}
            raw |= {"attempt": max(1, self.cluster.attempt), "restarts": 0, "step": step}
            self.process.poll(Progress.model_validate(raw))

    def unfinished(self) -> list[Json]:
        """Pods that run or may run."""
        pods = [p for p in self.api.of("Pod") if not ended(p)]
        return [p for p in pods if not self.cluster.on_lost_node(p)]

    def converge(self, steps: int = 150) -> None:
        """Let everything arrive, and every pod succeed, until nothing happens any more.

        Raises AssertionError if it never comes to rest.
        """
        self.process.connection.faults.clear()
        for _ in range(steps):
            before = self.api.version
            self.cluster.control()
            self.cluster.kubelets()
            self.cluster.succeed()
            self._settle()
            if self.api.version == before and not self._advance():
                return
        raise AssertionError(f"no rest: {self.status}")

    def _settle(self) -> None:
        """Deliver all events, and work until there is nothing to do."""
        for _ in range(30):
            for kind in self.api.log:
                self.process.deliver(kind, 1_000_000)
            if not self.work() and not self.process.behind():
                return
        raise AssertionError(f"passes never end: {self.status}")

    def _advance(self) -> bool:
        """Advance to the next timer of the operator, or past the back-off of Jobs; return whether
        there was something to wait for."""
        timers = self.process.queue.timers.values()
        waits = [j for j in self.api.of("Job") if self._waits(j)]
        if not timers and not waits and self._swept:
            return False
        if not timers and not waits:
            self._swept = True
            self.process.sweep()
            return True
        self._swept = False
        step = min(timers, default=self.api.now + timedelta(seconds=60)) - self.api.now
        self.wait(min(max(step.total_seconds(), 1.0), 60.0 if waits else 1e9))
        return True

    _swept = False

    def _waits(self, job: Json) -> bool:
        """Whether the Job controller waits before it replaces a pod."""
        over = {c["type"] for c in job.get("status", {}).get("conditions", [])}
        pods = self.cluster.pods_of(job)
        failed = any(phase_of(p) == "Failed" for p in pods)
        return failed and not over and not all_alive(job, pods)


def all_alive(job: Json, pods: list[Json]) -> bool:
    return sum(phase_of(p) != "Failed" for p in pods) >= job["spec"].get("completions", 1)


@contextmanager
def clock_of(api: SimulatedApi) -> Iterator[None]:
    """Give the operator's modules the simulated time."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return api.now

    patches = [
        mock.patch.object(module, "datetime", Clock)
        for module in _modules()
        if getattr(module, "datetime", None) is datetime
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def _modules() -> list[Any]:
    found = pkgutil.walk_packages(finetune_operator.__path__, "finetune_operator.")
    return [importlib.import_module(m.name) for m in found if not m.name.endswith("__main__")]
