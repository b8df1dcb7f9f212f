"""The loads. Each starts its own cluster, and the operator in it as a real process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from bare import Bare
from client import AGENT, FINETUNEJOBS, JOBS, Client, finetunejob
from measured import MeasuredOperator
from observer import Observer
from plane import BenchPlane
from rows import Row
from trainers import Trainers

PATIENCE = 600.0
"""Seconds to wait for the end of a load."""


def name_of(number: int) -> str:
    return f"job-{number:05d}"


@contextmanager
def operator_in(plane: BenchPlane) -> Iterator[MeasuredOperator]:
    log = plane.folder / "operator.log"
    with MeasuredOperator(plane, log) as operator:
        yield operator


# --- a burst, or a steady rate, of new jobs ------------------------------------------------------


async def _arrive(count: int, rate: float, create: Callable[[str], Awaitable[None]]) -> None:
    """Create jobs, ``rate`` a second (infinite: all at once)."""
    began = time.monotonic()
    tasks = []
    for number in range(count):
        await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
        tasks.append(asyncio.create_task(create(name_of(number))))
    await asyncio.gather(*tasks)


async def ours(count: int, rate: float, nodes: int) -> Row:
    """FineTuneJobs, which the operator turns into gangs."""
    with BenchPlane() as plane, operator_in(plane) as operator:
        async with Client(plane.kubeconfig) as client, Observer(client, nodes) as observer:
            before = operator.figures()

            async def create(name: str) -> None:
                observer.asked[name] = time.monotonic()
                await client.send("POST", FINETUNEJOBS, finetunejob(name, nodes))

            await _arrive(count, rate, create)
            await observer.until_whole(count, PATIENCE)
            await _at_rest(operator)
            return Row.of("ours", observer, count, operator.figures().since(before))


async def bare(count: int, rate: float, nodes: int) -> Row:
    """The same children, made by a client."""
    with BenchPlane() as plane:
        async with (
            Client(plane.user) as maker,
            Client(plane.kubeconfig) as client,
            Observer(client, nodes) as observer,
        ):
            made = Bare(maker, observer, nodes)
            following = asyncio.create_task(made.follow())
            await _arrive(count, rate, made.create)
            await observer.until_whole(count, PATIENCE, following)
            following.cancel()
            return Row.of("bare", observer, count, None, plane.writes(AGENT))


async def _at_rest(operator: MeasuredOperator) -> None:
    """Wait until the operator has had no pass for three seconds."""
    passes, until = -1, time.monotonic() + 60
    while (now := operator.figures().passes) != passes and time.monotonic() < until:
        passes = now
        await asyncio.sleep(3)


# --- a steady state ------------------------------------------------------------------------------


async def steady(count: int, nodes: int, seconds: float) -> None:
    """Running jobs with progress, then a restart of the operator among them."""
    with BenchPlane() as plane, operator_in(plane) as operator:
        async with Client(plane.kubeconfig) as client, Observer(client, nodes) as observer:

            async def create(name: str) -> None:
                await client.send("POST", FINETUNEJOBS, finetunejob(name, nodes))

            await _arrive(count, 15.0, create)
            await observer.until_whole(count, PATIENCE)
            await _at_rest(operator)
            trainers = Trainers(client)
            await trainers.know()
            async with trainers.serve():
                await asyncio.sleep(15)  # the first progress of all jobs
                await _window("steady", operator, trainers, seconds, count)
                jobs = await _uids(client)
                operator.kill()
                began = time.monotonic()
                await asyncio.to_thread(operator.start)
                ready = time.monotonic() - began
                while operator.figures().passes < count:
                    await asyncio.sleep(0.2)
                took = time.monotonic() - began
                now = operator.figures()
                print(
                    f"restart: ready after {ready:.1f} s, every job reconciled after {took:.1f} s,"
                    f" {now.cpu:.1f} s CPU, RSS peak {now.peak:.0f} MiB,"
                    f" children replaced: {len(jobs - await _uids(client))}"
                )
                await _window("after it", operator, trainers, seconds, count)


async def _window(
    title: str, operator: MeasuredOperator, trainers: Trainers, seconds: float, count: int
) -> None:
    before, reads, began = operator.figures(), trainers.reads, time.monotonic()
    await asyncio.sleep(seconds)
    took = time.monotonic() - began
    found = operator.figures().since(before)
    print(
        f"{title}: {count} jobs, {took:.0f} s: {found.cpu / took:.2f} cores,"
        f" {(trainers.reads - reads) / took:.0f} reads of progress/s, {found.passes / took:.1f}"
        f" passes/s, {found.writes.total() / took:.1f} writes/s {dict(found.writes)},"
        f" RSS {found.rss:.0f} MiB, peak {found.peak:.0f} MiB",
        flush=True,
    )


async def _uids(client: Client) -> set[str]:
    found = await client.send("GET", JOBS)
    return {job["metadata"]["uid"] for job in found["items"]}


# --- churn ---------------------------------------------------------------------------------------


async def churn(count: int, nodes: int, at_a_time: int) -> None:
    """Jobs that are created, completed and deleted; memory after every tenth of them."""
    with BenchPlane(("prepare", "train", "publish")) as plane, operator_in(plane) as operator:
        async with Client(plane.kubeconfig) as client:
            slots = asyncio.Semaphore(at_a_time)
            before, done, deletions = operator.figures(), 0, set()
            print(f"churn: {count} jobs of {nodes} node(s), {at_a_time} at a time", flush=True)

            async def end_completed() -> None:
                nonlocal done
                async for kind, job in client.watch(FINETUNEJOBS):
                    phase = job.get("status", {}).get("phase")
                    if kind == "MODIFIED" and phase == "Failed":
                        raise AssertionError(job["status"]["failure"])
                    if kind == "DELETED":
                        done += 1
                        slots.release()
                        if done % (count // 10) == 0:
                            now = operator.figures()
                            print(
                                f"  {done}: RSS {now.rss:.0f} MiB, peak {now.peak:.0f}", flush=True
                            )
                    elif phase == "Complete" and "deletionTimestamp" not in job["metadata"]:
                        name = job["metadata"]["name"]
                        deletion = client.send("DELETE", f"{FINETUNEJOBS}/{name}")
                        deletions.add(asyncio.create_task(deletion))

            following = asyncio.create_task(end_completed())
            for number in range(count):
                await slots.acquire()
                if following.done():
                    following.result()
                await client.send("POST", FINETUNEJOBS, finetunejob(name_of(number), nodes))
            while done < count and not following.done():
                await asyncio.sleep(0.5)
            await _at_rest(operator)
            found = operator.figures().since(before)
            print(
                f"  at rest: RSS {found.rss:.0f} MiB; {found.passes / count:.1f} passes and"
                f" {found.writes.total() / count:.1f} writes a job over its whole life,"
                f" {1000 * found.cpu / count:.0f} ms CPU a job"
            )
            following.cancel()
