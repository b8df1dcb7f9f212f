"""Times at which jobs have their first child Job and their whole gang, by watches of metadata."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from typing import Self

from client import JOBS, METADATA, PODS, Client

from finetune_api import names

_OURS = f"{names.LABEL_MANAGED_BY}={names.MANAGED_BY}"


class Observer:
    """Watches the children of all jobs. Use as an async context manager.

    The name of a job is in a label of its children. A gang is whole when all of its pods run.
    """

    def __init__(self, client: Client, nodes: int) -> None:
        self._client, self._nodes = client, nodes
        self.asked: dict[str, float] = {}
        """When the request to create a job was sent."""
        self.first: dict[str, float] = {}
        self.whole: dict[str, float] = {}
        self._pods: defaultdict[str, set[str]] = defaultdict(set)
        """Names of the running pods of each gang."""

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._jobs()), asyncio.create_task(self._running())]
        return self

    async def __aexit__(self, *exc: object) -> None:
        for task in self._tasks:
            task.cancel()

    async def _jobs(self) -> None:
        async for kind, job in self._client.watch(JOBS, METADATA, labelSelector=_OURS):
            if kind == "ADDED":
                self.first.setdefault(_name(job), time.monotonic())

    async def _running(self) -> None:
        selector = f"{_OURS},{names.LABEL_ROLE}=train"
        events = self._client.watch(
            PODS, METADATA, labelSelector=selector, fieldSelector="status.phase=Running"
        )
        async for kind, pod in events:
            if kind == "ADDED":
                gang = self._pods[_name(pod)]
                gang.add(pod["metadata"]["name"])
                if len(gang) == self._nodes:
                    self.whole.setdefault(_name(pod), time.monotonic())

    async def until_whole(self, count: int, seconds: float, *tasks: asyncio.Task[None]) -> None:
        """Wait until so many gangs are whole.

        Raises:
            TimeoutError: it takes longer.
            Exception: of one of the tasks that bring it about.
        """
        until = time.monotonic() + seconds
        while len(self.whole) < count:
            for task in (*self._tasks, *tasks):
                if task.done():
                    task.result()
            if time.monotonic() > until:
                raise TimeoutError(f"{len(self.whole)} of {count} gangs are whole")
            await asyncio.sleep(0.1)


def _name(obj: dict) -> str:  # type: ignore[type-arg]
    return str(obj["metadata"]["labels"][names.LABEL_JOB_NAME])
