"""Times at which jobs have their first child Job and their whole gang, by watches of metadata."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
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
        self._pods: Counter[str] = Counter()

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
                self._pods[_name(pod)] += 1
                if self._pods[_name(pod)] == self._nodes:
                    self.whole[_name(pod)] = time.monotonic()

    async def until_whole(self, count: int, seconds: float) -> bool:
        """Wait until so many gangs are whole; return False if that takes longer."""
        until = time.monotonic() + seconds
        while len(self.whole) < count:
            for task in self._tasks:
                if task.done():
                    task.result()
            if time.monotonic() > until:
                return False
            await asyncio.sleep(0.1)
        return True


def _name(obj: dict) -> str:  # type: ignore[type-arg]
    return str(obj["metadata"]["labels"][names.LABEL_JOB_NAME])
