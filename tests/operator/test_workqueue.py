"""The work queue: one worker a key, no key lost, a rest after each pass, backoff after errors."""

from __future__ import annotations

import asyncio
from typing import Any

from finetune_operator import workqueue
from finetune_operator.workqueue import WorkQueue


def test_a_key_is_worked_on_by_one_worker_at_a_time_and_never_lost(monkeypatch: Any) -> None:
    monkeypatch.setattr(workqueue, "REST_SECONDS", 0.001)

    async def scenario() -> list[str]:
        queue, seen, working = WorkQueue(), [], set()
        done = asyncio.Event()

        async def handle(key: str) -> bool:
            assert key not in working
            working.add(key)
            seen.append(key)
            if len(seen) < 50:
                queue.put("a")
                queue.put("a")
                queue.put(f"b{len(seen) % 3}")
            else:
                done.set()
            await asyncio.sleep(0)
            working.discard(key)
            return True

        workers = [asyncio.create_task(queue.work(handle)) for _ in range(8)]
        queue.put("a")
        await asyncio.wait_for(done.wait(), 10)
        for worker in workers:
            worker.cancel()
        return seen

    seen = asyncio.run(scenario())
    assert seen.count("a") > 10 and {"b0", "b1", "b2"} <= set(seen)


def test_errors_are_backed_off_and_forgotten_after_success(monkeypatch: Any) -> None:
    monkeypatch.setattr(workqueue, "REST_SECONDS", 0.0)
    delays: list[float] = []

    async def scenario() -> None:
        queue = WorkQueue()
        monkeypatch.setattr(queue, "put_after", lambda key, seconds: delays.append(seconds))
        outcomes = iter([False, False, False, True, False])
        idle = asyncio.Event()

        async def handle(key: str) -> bool:
            idle.set()
            return next(outcomes)

        worker = asyncio.create_task(queue.work(handle))
        for _ in range(5):
            idle.clear()
            queue.put("a")
            await asyncio.wait_for(idle.wait(), 5)
            await asyncio.sleep(0)
        worker.cancel()

    asyncio.run(scenario())
    assert len(delays) == 4
    assert delays[0] < delays[1] < delays[2] and delays[3] < delays[1]


def drained(puts: list[tuple[float, str]], workers: int = 1) -> list[str]:
    """Keys that workers handle, in order, if keys are put after these delays."""

    async def scenario() -> list[str]:
        queue, seen = WorkQueue(), []

        async def handle(key: str) -> bool:
            seen.append(key)
            await asyncio.sleep(0.001)
            return True

        tasks = [asyncio.create_task(queue.work(handle)) for _ in range(workers)]
        for delay, key in puts:
            await asyncio.sleep(delay)
            queue.put(key)
        while len(queue):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        return seen

    return asyncio.run(scenario())


def test_a_burst_of_events_about_a_key_is_one_more_pass() -> None:
    burst = [(0.001, "a")] * 50
    assert len(burst) * 0.001 < workqueue.REST_SECONDS
    assert drained(burst) == ["a", "a"], "the first at once, the rest together after a rest"


def test_a_first_pass_does_not_wait_for_passes_of_known_keys(monkeypatch: Any) -> None:
    monkeypatch.setattr(workqueue, "REST_SECONDS", 0.0)
    known = [(0.0, key) for key in "abc"]
    again = [(0.05 * (key == "a"), key) for key in "abc"]
    seen = drained([*known, *again, (0.0, "new")])
    assert seen == ["a", "b", "c", "a", "new", "b", "c"], "the worker has a when new comes"


def test_put_after_keeps_the_earliest_time() -> None:
    async def scenario() -> list[str]:
        queue, seen = WorkQueue(), []
        done = asyncio.Event()

        async def handle(key: str) -> bool:
            seen.append(key)
            done.set()
            return True

        worker = asyncio.create_task(queue.work(handle))
        queue.put_after("a", 3600)
        queue.put_after("a", 0.01)
        queue.put_after("a", 3600)
        await asyncio.wait_for(done.wait(), 5)
        worker.cancel()
        return seen

    assert asyncio.run(scenario()) == ["a"]
