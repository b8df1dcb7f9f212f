"""The operator process behind a proxy that fails: killed after each of its writes, an API server
that refuses, delays, loses and repeats, that goes away, and whose history is compacted; a Lease
whose renewals hang. Each time the run ends as without the fault, and nothing is made twice."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from faulty_api import Call, Fault, FaultyApi
from operator_job import Job, walk_to_training
from operator_process import ForkedOperator, OperatorProcess
from operator_world import PUBLISHED, TRAINED

from cluster.api import eventually
from cluster.control_plane import ControlPlane
from finetune_api import names

CRD = Path(__file__).parents[2] / "crds" / "finetunejob.crd.yaml"
AWAY = float(os.environ.get("FINETUNE_TEST_AWAY_SECONDS", "10"))
"""Seconds for which the API server is away."""
STAGES = {"prepare-1": 1, "train-1": 2, "publish-1": 1}
"""Jobs of a run, and the number of their pods."""


@pytest.fixture(scope="module")
def plane() -> Iterator[ControlPlane]:
    with ControlPlane(kwok_nodes=2) as plane:
        plane.kubectl("apply", "--server-side", "-f", CRD)
        yield plane


@pytest.fixture
def job(plane: ControlPlane, request: pytest.FixtureRequest) -> Iterator[Job]:
    name = request.node.name.replace("_", "-")[:60].rstrip("-")
    made = Job(plane, name, within=120)
    yield made
    plane.kubectl("delete", "ftj", "bot", "-n", name, "--ignore-not-found")


@contextmanager
def operator(proxy: FaultyApi, folder: Path, *arguments: str) -> Iterator[OperatorProcess]:
    kubeconfig = proxy.kubeconfig(folder / "kubeconfig")
    election = [] if "--lease-name" in arguments else ["--leader-election", "false"]
    with ForkedOperator(kubeconfig, folder / "log", *election, *arguments) as process:
        yield process


def live(job: Job) -> None:
    """A whole run, with pods that end well."""
    walk_to_training(job)
    job.end("train", count=2, trained=TRAINED)
    job.end("publish", published=PUBLISHED)
    job.reach("Complete")


def nothing_was_made_twice(job: Job) -> None:
    assert job.names("jobs") == sorted(STAGES)
    assert job.names("configmaps") == ["run-spec-1"] and job.names("services") == ["train-1"]
    pods = Counter(p["metadata"]["labels"]["batch.kubernetes.io/job-name"] for p in job.all("pods"))
    assert {name.split("-", 3)[-1]: count for name, count in pods.items()} == STAGES
    status = job.status
    assert (status["run"]["number"], status["run"]["revision"]) == (1, 1)
    assert (status["restarts"], status["phase"]) == (0, "Complete")
    listed = job.api.get("events", "-n", job.namespace)["items"]
    ours = (e for e in listed if e["involvedObject"]["kind"] == names.KIND)
    told = Counter((e["reason"], e["message"]) for e in ours)
    assert max(told.values(), default=0) <= 1, told


@pytest.mark.slow
def test_an_operator_that_is_killed_after_each_of_its_writes(
    plane: ControlPlane, job: Job, tmp_path: Path
) -> None:
    """The state after write k is also that before write k + 1: this is every place for a crash."""
    killed: list[str] = []

    def kill(call: Call) -> Fault | None:
        if not call.is_write:
            return None

        def after() -> None:
            if process.is_running():
                killed.append(f"{call.method} {call.path.partition('?')[0]}")
                process.kill()

        return Fault(afterwards=after)

    with (
        FaultyApi(plane, kill) as proxy,
        operator(proxy, tmp_path) as process,
        kept_alive(process),
    ):
        live(job)
        eventually("a process that has nothing to write", lambda: settled(process), within=60)
    kinds = Counter(path.rpartition("/")[2].split("-")[0] for path in killed)
    print(f"killed {len(killed)} times: {dict(kinds)}")
    # How often status is written depends on how fast a process comes back. The run spec and the
    # network policy are made side by side: one of them may be on its way as the process dies.
    made = {"services": 1, "jobs": 3}
    assert made.items() <= kinds.items() and kinds["status"], killed
    nothing_was_made_twice(job)


@contextmanager
def kept_alive(process: OperatorProcess) -> Iterator[None]:
    """Start the operator again whenever it has ended."""
    over = threading.Event()

    def keep() -> None:
        while not over.wait(0.05):
            if not process.is_running():
                process.spawn()

    keeper = threading.Thread(target=keep, daemon=True)
    keeper.start()
    try:
        yield
    finally:
        over.set()
        keeper.join()


def settled(process: OperatorProcess) -> bool:
    """Whether the operator has listed everything, and found nothing to write."""
    try:
        return bool(process.metric("finetune_operator_reconcile_seconds_count"))
    except AssertionError:  # it was killed once more
        return False


def test_requests_that_fail_are_repeated(plane: ControlPlane, job: Job, tmp_path: Path) -> None:
    """Refusals, lost and late answers, repeated events, expired watches."""
    writes = itertools.cycle([
        Fault(status=500), None, Fault(lose=True), Fault(status=409), None,
        Fault(status=429, headers={"Retry-After": "1"}), Fault(delay=0.5), None,
    ])  # fmt: skip
    watches = itertools.count()
    lock = threading.Lock()

    def fail(call: Call) -> Fault | None:
        with lock:
            if call.is_watch:
                return Fault(repeat_events=True, expired=next(watches) % 3 == 1)
            return next(writes) if call.is_write else None

    with FaultyApi(plane, fail) as proxy, operator(proxy, tmp_path) as process:
        live(job)
        assert process.is_running()
    nothing_was_made_twice(job)


def test_a_write_that_hangs_is_given_up_and_repeated(
    plane: ControlPlane, job: Job, tmp_path: Path
) -> None:
    hung: set[str] = set()

    def fail(call: Call) -> Fault | None:
        kind = call.path.partition("?")[0].rpartition("/")[2] if call.is_write else ""
        if kind not in ("jobs", "services") or kind in hung:
            return None
        hung.add(kind)
        return Fault(hang=True)

    with FaultyApi(plane, fail) as proxy, operator(proxy, tmp_path):
        live(job)
    assert hung == {"jobs", "services"}
    nothing_was_made_twice(job)


@pytest.mark.slow
def test_an_api_server_that_goes_away_and_forgets(
    plane: ControlPlane, job: Job, tmp_path: Path
) -> None:
    """Its history is compacted meanwhile, so that no watch can continue where it was."""
    with FaultyApi(plane) as proxy, operator(proxy, tmp_path) as process:
        walk_to_training(job)
        job.end("train", count=2, trained=TRAINED)
        plane.stop_api_server()
        time.sleep(AWAY)
        compact(plane)
        plane.start_api_server()
        job.end("publish", published=PUBLISHED)
        job.reach("Complete")
        assert process.is_running(), "no crash loop"
    nothing_was_made_twice(job)


def compact(plane: ControlPlane) -> None:
    """Compact etcd's history up to its newest revision."""

    def ask(path: str, body: dict[str, str]) -> dict[str, dict[str, str]]:
        request = urllib.request.Request(
            f"{plane.etcd}/v3/kv/{path}", json.dumps(body).encode(), method="POST"
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            found: dict[str, dict[str, str]] = json.load(answer)
            return found

    newest = ask("range", {"key": "AA=="})["header"]["revision"]
    ask("compaction", {"revision": newest})


@pytest.mark.slow
def test_a_deletion_that_no_watch_tells_is_noticed(
    plane: ControlPlane, job: Job, tmp_path: Path
) -> None:
    """After an expired watch kopf lists again, and tells nothing about what is gone."""
    blind, expired = threading.Event(), set[str]()

    def fail(call: Call) -> Fault | None:
        if not call.is_watch or not (blind.is_set() or expired):
            return None
        path = call.path.partition("?")[0]
        if blind.is_set():
            expired.add(path)
            return Fault(hang=True)
        if path not in expired:
            return None
        expired.discard(path)
        return Fault(expired=True)

    with FaultyApi(plane, fail) as proxy, operator(proxy, tmp_path):
        walk_to_training(job)
        (gang,) = (j for j in job.all("jobs") if "-train-" in j["metadata"]["name"])
        blind.set()
        proxy.cut_watches()
        job.api.kubectl("delete", "job", gang["metadata"]["name"], "-n", job.namespace)
        eventually("no gang is left", lambda: len(job.names("pods")) == 1, within=60)
        blind.clear()
        proxy.cut_watches()
        job.running("train", 2)
        job.end("train", count=2, trained=TRAINED)
        job.end("publish", published=PUBLISHED)
        job.reach("Complete")
    assert job.status["run"]["revision"] == 1


@pytest.mark.slow
def test_a_leader_whose_renewals_hang_stops_before_the_next_begins(
    plane: ControlPlane, job: Job, tmp_path: Path
) -> None:
    hanging = threading.Event()
    renewed = [0.0]
    first_writes: list[float] = []
    second_writes: list[float] = []

    def of_first(call: Call) -> Fault | None:
        if call.is_write:
            first_writes.append(time.monotonic())
        if not call.is_lease:
            return None
        if hanging.is_set():
            return Fault(hang=True)
        if call.method == "PUT":
            return Fault(afterwards=lambda: renewed.__setitem__(0, time.monotonic()))
        return None

    def of_second(call: Call) -> Fault | None:
        if call.is_write:
            second_writes.append(time.monotonic())
        return None

    options = ("--lease-name", "hanging")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with (
        FaultyApi(plane, of_first) as one, operator(one, tmp_path / "a", *options) as first,
        FaultyApi(plane, of_second) as two, operator(two, tmp_path / "b", *options),
    ):  # fmt: skip
        walk_to_training(job)
        hanging.set()
        began = time.monotonic()
        churn = Churn(job)
        assert first.wait(60) == 1, "a process that lost its Lease exits"
        eventually("the second works", lambda: second_writes, within=60)
        churn.end()
        print(f"fail-over {second_writes[0] - began:.1f} s after the first renewal that hung")
        assert max(first_writes) < second_writes[0], "two operators have written"
        job.end("train", count=2, trained=TRAINED)
        job.end("publish", published=PUBLISHED)
        job.reach("Complete")
    nothing_was_made_twice(job)


class Churn:
    """Edits a job again and again, so that its operator has something to write."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for number in itertools.count():
            if self._over.wait(0.3):
                return
            self._job.patch(failurePolicy={"maxRestarts": 3 + number % 2})

    def end(self) -> None:
        self._over.set()
        self._thread.join()
