"""Unit tests of the impure parts: cluster client, progress poller, controller."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from aiohttp import web
from operator_world import CONFIG, UID, World, at_training, stored_object

from finetune_api import names
from finetune_operator import controller as controller_module
from finetune_operator import progress as progress_module
from finetune_operator import watch
from finetune_operator.cluster import ApiError, Cluster, Credentials, NotLeading
from finetune_operator.controller import Controller
from finetune_operator.decision.plan import Event, Plan, Subject
from finetune_operator.metrics import Metrics
from finetune_operator.progress import Poller
from finetune_operator.store import Store
from finetune_operator.workqueue import WorkQueue
from finetune_operator.world.objects import format_time
from ports import free_port


def test_writes_without_leadership_raise() -> None:
    async def scenario() -> None:
        cluster = Cluster(Credentials(host="http://127.0.0.1:1"))
        cluster.guard = lambda: False
        child = {"kind": "Job", "metadata": {"name": "a", "namespace": "b"}}
        for write in (
            cluster.create(child),
            cluster.patch("Job", "b", "a", {}),
            cluster.delete("Job", "b", "a", "uid"),
        ):
            with pytest.raises(NotLeading):
                await write

    asyncio.run(scenario())


def polled(
    world: World, answers: list[Any], rounds: int, pieces: bool = False
) -> tuple[Store, list[str]]:
    """Poll a real server that sends these answers in turn, and then repeats the last one."""
    store = Store()
    store.put(names.KIND, stored_object(names.KIND, UID, 1))
    for pod in world.of("Pod"):
        pod["metadata"] |= {"resourceVersion": "1", "namespace": "team"}
        pod["status"]["podIP"] = "127.0.0.1"
        store.put("Pod", pod)
    told: list[str] = []
    asked = 0

    async def progress(request: web.Request) -> web.StreamResponse:
        nonlocal asked
        answer = answers[min(asked, len(answers) - 1)]
        asked += 1
        if answer == "redirect":
            raise web.HTTPFound("/progress")
        text = answer if isinstance(answer, str) else json.dumps(answer)
        if not pieces:
            return web.Response(text=text)
        response = web.StreamResponse()
        await response.prepare(request)
        for start in range(0, len(text), 40):
            await response.write(text[start : start + 40].encode())
            await asyncio.sleep(0.005)
        return response

    async def scenario() -> None:
        app = web.Application()
        app.router.add_get("/progress", progress)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", progress_module.METRICS_PORT).start()
        poller = Poller(store, None, lambda uid, _: told.append(uid), proxy=False)  # type: ignore[arg-type]
        task = asyncio.create_task(poller.run())
        async with asyncio.timeout(20):
            while asked < rounds:
                await asyncio.sleep(0.01)
        task.cancel()
        await runner.cleanup()

    asyncio.run(scenario())
    return store, told


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "METRICS_PORT", free_port())
    monkeypatch.setattr(progress_module, "POLL_SECONDS", 0.01)


@pytest.mark.usefixtures("quick")
def test_progress_is_read_coalesced_and_compared() -> None:
    world = at_training()
    base = {"run": world.run["id"], "attempt": 1, "restarts": 0, "stage": "Training"}
    account = {"attempt": 1, "processes": 2, "began": 1, "until": 9, "progressed": 9}
    answers = [
        "not json",
        {**base, "run": "9-other", "step": 99},
        {**base, "step": 1},
        {**base, "step": 1, "updated": 2.0},
        {**base, "step": 2},
        {**base, "step": 3, "stage": "Evaluating"},
        {**base, "step": 3, "stage": "Evaluating", "time": account},
    ]
    store, told = polled(world, answers, rounds=12)
    assert told == [UID, UID], "the first, and the new stage; step 2 came too soon to store"
    progress = store.observed(UID).progress
    assert progress is not None and (progress.step, progress.stage) == (3, "Evaluating")
    assert progress.time is not None, "the newest account of the time is kept, and wakes no pass"


@pytest.mark.usefixtures("quick")
def test_chunked_progress_is_read_completely() -> None:
    world = at_training()
    answer = {"run": world.run["id"], "attempt": 1, "restarts": 0, "stage": "Training", "step": 7}
    store, _ = polled(world, [answer], rounds=3, pieces=True)
    progress = store.observed(UID).progress
    assert progress is not None and progress.step == 7


class Recorder:
    """A cluster that records writes."""

    def __init__(self) -> None:
        self.statuses: list[dict[str, Any]] = []
        self.events: list[str] = []

    async def apply_status(self, subject: Subject, status: dict[str, Any]) -> dict[str, Any]:
        self.statuses.append(status)
        return stored_object(names.KIND, UID, 1 + len(self.statuses), spec={}, status=status)

    async def event(self, subject: Subject, event: Event, instance: str) -> None:
        self.events.append(event.reason)


def test_a_defect_in_one_jobs_pass_is_reported_and_retried(
    monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def decide(*_: Any) -> Plan:
        raise TypeError("a defect")

    async def scenario() -> Recorder:
        monkeypatch.setattr(controller_module, "decide", decide)
        store, cluster = Store(), Recorder()
        store.put(names.KIND, at_training().job | stored_object(names.KIND, UID, 1))
        metrics = Metrics(store, lambda: 0)
        controller = Controller(store, cluster, WorkQueue(), CONFIG, metrics, "here")  # type: ignore[arg-type]
        assert not await controller.handle(UID) and not await controller.handle(UID)
        return cluster

    cluster = asyncio.run(scenario())
    assert cluster.events == ["OperatorDefect"] and len(cluster.statuses) == 1
    assert "a defect" in caplog.text and "Traceback" in caplog.text


@pytest.mark.usefixtures("quick")
def test_a_redirect_of_a_pod_is_not_followed() -> None:
    """A user's own image may answer: the operator must not fetch other addresses for it."""
    world = at_training()
    answer = {"run": world.run["id"], "attempt": 1, "restarts": 0, "stage": "Training", "step": 7}
    store, told = polled(world, ["redirect", answer], rounds=1)
    assert told == [] and store.observed(UID).progress is None


def test_a_list_is_read_in_pages() -> None:
    pages = {
        "": {"metadata": {"resourceVersion": "7", "continue": "b"}, "items": ["u1", "u2"]},
        "b": {"metadata": {"resourceVersion": "9", "continue": "c"}, "items": ["u3"]},
        "c": {"metadata": {"resourceVersion": "9"}, "items": None},
    }

    async def scenario() -> tuple[int, set[str]]:
        async def answer(request: web.Request) -> web.Response:
            assert int(request.query["limit"]) > 0
            page = pages[request.query.get("continue", "")]
            items = page["items"] and [{"metadata": {"uid": uid}} for uid in page["items"]]
            return web.json_response({**page, "items": items})

        app, port = web.Application(), free_port()
        app.router.add_get("/api/v1/pods", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        async with Cluster(Credentials(host=f"http://127.0.0.1:{port}")) as cluster:
            found = await cluster.versions("Pod", None, "a=b")
        await runner.cleanup()
        return found

    assert asyncio.run(scenario()) == (7, {"u1", "u2", "u3"}), "the version of the first page"


def test_the_newest_warning_of_each_object_is_read_from_one_list() -> None:
    def event(uid: str, minute: int, text: str) -> dict[str, Any]:
        time = f"2026-01-01T10:{minute:02}:00Z"
        return {"involvedObject": {"uid": uid}, "lastTimestamp": time, "message": text}

    pages = {
        "": ([event("a", 2, "new"), event("other", 3, "x")], "b"),
        "b": ([event("a", 1, "old"), event("b", 1, "b's")], ""),
    }

    async def scenario() -> dict[str, str]:
        async def answer(request: web.Request) -> web.Response:
            assert request.query["fieldSelector"] == "type=Warning"
            items, following = pages[request.query.get("continue", "")]
            return web.json_response({"metadata": {"continue": following}, "items": items})

        app, port = web.Application(), free_port()
        app.router.add_get("/api/v1/namespaces/team/events", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        async with Cluster(Credentials(host=f"http://127.0.0.1:{port}")) as cluster:
            found = await cluster.newest_warnings("team", ["a", "b", "c"])
        await runner.cleanup()
        return found

    assert asyncio.run(scenario()) == {"a": "new", "b": "b's"}


class Refusing(Recorder):
    """A cluster that refuses requests about some children, with these answers in turn."""

    def __init__(self, kind: str, answers: list[ApiError]) -> None:
        super().__init__()
        self.kind, self.answers = kind, answers
        self.applied: list[str] = []

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        return None

    async def create(self, child: dict[str, Any]) -> dict[str, Any]:
        if child["kind"] == self.kind and self.answers:
            raise self.answers.pop(0)
        self.applied.append(child["kind"])
        meta = child["metadata"] | {"uid": child["kind"], "resourceVersion": "9"}
        made = {"creationTimestamp": format_time(datetime.now(UTC))}
        return child | {"metadata": meta | made}

    async def apply_status(self, subject: Subject, status: dict[str, Any]) -> dict[str, Any]:
        stored = await super().apply_status(subject, status)
        return {**World().job, **stored, "spec": World().job["spec"]}


@pytest.mark.parametrize(
    ("code", "retry_after", "retried"),
    [
        (500, None, None), (409, None, None), (429, 7.0, 7.0), (429, 3600.0, 60.0),
        (503, None, None), (403, None, 15.0),
    ],
)  # fmt: skip
def test_a_refused_child_is_shown_in_the_same_pass_and_retried(
    code: int, retry_after: float | None, retried: float | None, monkeypatch: Any
) -> None:
    """``retried``: after so many seconds; None: with the queue's backoff."""
    monkeypatch.setattr(controller_module, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(controller_module, "GATHER_SECONDS", 0.0)
    monkeypatch.setattr(controller_module, "SETTLE_LATENCIES", 0.0)
    queue, delays = WorkQueue(), list[float]()
    queue.put_after = lambda key, seconds: delays.append(seconds)  # type: ignore[method-assign]
    answer = ApiError("PATCH", "/jobs/a", code, "the webhook says no", retry_after)
    store, cluster = Store(), Refusing("Job", [answer])
    store.put(names.KIND, World().job | stored_object(names.KIND, UID, 1, spec=World().job["spec"]))
    controller = Controller(store, cluster, queue, CONFIG, Metrics(store, lambda: 0), "here")  # type: ignore[arg-type]
    assert asyncio.run(controller.handle(UID)) == (retried is not None)
    assert delays == ([] if retried is None else [retried])
    (status,) = cluster.statuses
    prepared = next(c for c in status["conditions"] if c["type"] == "Prepared")
    assert prepared["reason"] == "ChildRefused"
    assert f"{code} the webhook says no" in prepared["message"]
    assert cluster.applied == ["ConfigMap", "NetworkPolicy"]
    assert asyncio.run(controller.handle(UID))
    assert cluster.applied == ["ConfigMap", "NetworkPolicy", "Job"]
    assert asyncio.run(controller.handle(UID)), "the pass that the new Job's watch event causes"
    prepared = next(c for c in cluster.statuses[-1]["conditions"] if c["type"] == "Prepared")
    assert prepared["reason"] == "Preparing"


def test_what_is_due_soon_is_written_with_the_next_status(monkeypatch: Any) -> None:
    plans: list[Plan] = []
    subject = Subject("team", "bot", UID, 1)

    async def scenario() -> Recorder:
        monkeypatch.setattr(controller_module, "decide", lambda *_: plans[0])
        store, cluster, queue = Store(), Recorder(), WorkQueue()
        store.put(names.KIND, at_training().job | stored_object(names.KIND, UID, 1))
        metrics = Metrics(store, lambda: 0)
        controller = Controller(store, cluster, queue, CONFIG, metrics, "here")  # type: ignore[arg-type]
        for due, step in (("AtOnce", 1), ("Soon", 2), ("AtOnce", 3), ("Soon", 4)):
            plans[:] = [Plan(subject, status={"step": step}, urgency=due)]
            assert await controller.handle(UID)
        monkeypatch.setattr(controller_module, "SETTLE_SECONDS", 0.0)
        monkeypatch.setattr(controller_module, "SETTLE_LATENCIES", 0.0)
        assert await controller.handle(UID)
        assert len(cluster.statuses) == 2, "others may follow within a second"
        monkeypatch.setattr(controller_module, "GATHER_SECONDS", 0.0)
        assert await controller.handle(UID)
        assert list(queue._timers) == [UID], "a pass is due that writes it"
        return cluster

    cluster = asyncio.run(scenario())
    assert [status["step"] for status in cluster.statuses] == [1, 3, 4]


def test_first_statuses_wait_for_the_first_jobs_of_others(monkeypatch: Any) -> None:
    subject = Subject("team", "bot", UID, 1)
    plan = Plan(subject, status={"phase": "Pending"})

    async def scenario() -> list[int]:
        monkeypatch.setattr(controller_module, "decide", lambda *_: plan)
        store, cluster, queue = Store(), Recorder(), WorkQueue()
        store.put(names.KIND, World().job | stored_object(names.KIND, UID, 1))
        metrics = Metrics(store, lambda: 0)
        controller = Controller(store, cluster, queue, CONFIG, metrics, "here")  # type: ignore[arg-type]
        written = []
        for queue.new in (1, 0):
            assert await controller.handle(UID)
            written.append(len(cluster.statuses))
        assert len(queue) == 1, "a pass is due that writes it"
        return written

    assert asyncio.run(scenario()) == [0, 1]


def test_a_pass_that_has_written_is_followed_by_another() -> None:
    """The echo of a write causes no pass, but some actions follow a write: the outcome of a run is
    recorded on its run spec once status has it."""

    async def scenario() -> list[bool]:
        store, queue, job = Store(), WorkQueue(), World().job
        store.put(names.KIND, job | stored_object(names.KIND, UID, 1, spec=job["spec"]))
        cluster = Refusing("none", [])
        controller = Controller(store, cluster, queue, CONFIG, Metrics(store, lambda: 0), "here")  # type: ignore[arg-type]
        due = []
        for _ in range(3):
            queue._waiting.clear()
            assert await controller.handle(UID)
            due.append(bool(queue._waiting))
        return due

    assert asyncio.run(scenario()) == [True, False, False]


def test_passes_begin_once_the_watches_have_delivered_everything(monkeypatch: Any) -> None:
    monkeypatch.setattr(watch, "DELIVERED_SECONDS", 0.1)
    lists = {kind: [{f"{kind}-1"}] for kind in watch.RESOURCES}
    lists["Pod"] = [{"Pod-1", "vanished"}, {"Pod-1"}]

    class Lists:
        async def versions(self, kind: str, namespace: str | None, selector: str) -> Any:
            found = lists[kind]
            return 1, found.pop(0) if len(found) > 1 else found[0]

    async def scenario() -> None:
        listing = watch.Listing()
        task = asyncio.create_task(listing.complete(Lists(), ()))  # type: ignore[arg-type]
        for kind in watch.RESOURCES:
            await asyncio.sleep(0.01)
            assert not task.done(), kind
            listing.note(f"{kind}-1")
        await asyncio.wait_for(task, 10)

    asyncio.run(scenario())
    assert len(lists["Pod"]) == 1, "an object that vanished in the meantime is not waited for"


def test_an_invalid_network_policy_fails_no_job() -> None:
    """Its content is the administrator's, so that the job waits until they have corrected it."""
    queue = WorkQueue()
    queue.put_after = lambda key, seconds: None  # type: ignore[method-assign]
    answer = ApiError("PATCH", "/networkpolicies/a", 422, "cidr: invalid")
    store, cluster = Store(), Refusing("NetworkPolicy", [answer])
    store.put(names.KIND, World().job | stored_object(names.KIND, UID, 1, spec=World().job["spec"]))
    controller = Controller(store, cluster, queue, CONFIG, Metrics(store, lambda: 0), "here")  # type: ignore[arg-type]
    assert asyncio.run(controller.handle(UID))
    assert (cluster.applied, cluster.statuses[-1]["phase"]) == (["ConfigMap"], "Pending")
    assert asyncio.run(controller.handle(UID))
    assert cluster.applied == ["ConfigMap", "NetworkPolicy", "Job"]


def test_causes_of_the_wait_for_the_api_server_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    answers = [
        web.Response(status=404, text="{}"),
        web.Response(status=403, text='{"message": "user x may not"}'),
        web.json_response({"resources": []}),
        web.json_response({"resources": [{"name": names.PLURAL}]}),
    ]

    async def scenario() -> None:
        async def group(_: web.Request) -> web.Response:
            return answers.pop(0)

        app, port = web.Application(), free_port()
        app.router.add_get(f"/apis/{names.API_VERSION}", group)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        async with Cluster(Credentials(host=f"http://127.0.0.1:{port}")) as cluster:
            await asyncio.wait_for(cluster.wait_until_served(), 20)
        await runner.cleanup()

    asyncio.run(scenario())
    missing, denied, without = [r.getMessage() for r in caplog.records if "waiting" in r.msg]
    assert "does not know it" in missing and "finetunejob.crd.yaml" in missing
    assert "user x may not" in denied and f"no {names.PLURAL}" in without
