"""Progress of running gangs: polled from pod 0, at its address or through the API server.

A gang whose progress cannot be read still runs and still ends correctly: a missing reply has no
consequence.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import aiohttp

from finetune_api.base import read_known
from finetune_api.names import METRICS_PORT
from finetune_api.results import Progress
from finetune_operator.cluster import ApiError, Cluster
from finetune_operator.decision.stages import GANG
from finetune_operator.store import Store
from finetune_operator.world.pods import PodView

POLL_SECONDS: Final = 2.0
READS_PER_SECOND: Final = 100.0
"""Most reads a second: from 200 gangs on each is read less often than every POLL_SECONDS."""
WRITE_SECONDS: Final = 3.0
"""Minimum time between status writes of a job that only its progress causes."""
WRITES_PER_SECOND: Final = 50.0
"""Most such writes a second: from 150 gangs on each is written less often."""
SILENT_SECONDS: Final = 20.0
"""How long a gang may not answer before it is read less often."""
SILENT_POLL_SECONDS: Final = 10.0
TIMEOUT_SECONDS: Final = 2.0
CONCURRENT_POLLS: Final = 32
LARGEST_RESPONSE: Final = 65536
"""Bytes."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gang:
    """Pod 0 of a running gang."""

    uid: str
    namespace: str
    run: str
    pod: str
    ip: str

    @property
    def pod_key(self) -> str:
        return f"{self.namespace}/{self.pod}"


class Poller:
    """Reads ``/progress`` of every running gang and enqueues jobs whose progress changed."""

    def __init__(
        self, store: Store, cluster: Cluster, enqueue: Callable[[str, float], None], proxy: bool
    ) -> None:
        """``enqueue(uid, seconds)`` enqueues a key after a delay; ``proxy`` reads through the API
        server, for an operator outside the cluster."""
        self._store = store
        self._cluster = cluster
        self._enqueue = enqueue
        self._proxy = proxy
        self._stored: dict[str, tuple[Progress, float, datetime]] = {}
        """The last progress that changed, by uid of the job, and when, on two clocks."""
        self._silent: dict[str, float] = {}
        """Since when a pod has not answered."""
        self._write_seconds = WRITE_SECONDS
        self._slots = asyncio.Semaphore(CONCURRENT_POLLS)

    async def run(self) -> None:
        """Poll until cancelled."""
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while True:
                try:
                    await self._poll_all(session)
                except Exception:  # odd objects of one job must not end the operator
                    log.exception("polling progress")
                await asyncio.sleep(0.01)

    async def _poll_all(self, session: aiohttp.ClientSession) -> None:
        """Read all gangs once, spread evenly over the time between two reads of the same gang."""
        began, gangs = time.monotonic(), list(running_gangs(self._store))
        seconds = max(POLL_SECONDS, len(gangs) / READS_PER_SECOND)
        self._write_seconds = max(WRITE_SECONDS, len(gangs) / WRITES_PER_SECOND)
        async with asyncio.TaskGroup() as reads:
            for number, gang in enumerate(gangs):
                due = began + seconds * number / len(gangs)
                if due > time.monotonic():
                    await asyncio.sleep(due - time.monotonic())
                if self._is_due(gang, seconds):
                    reads.create_task(self._poll(session, gang))
        uids, pods = {g.uid for g in gangs}, {g.pod_key for g in gangs}
        self._stored = {u: t for u, t in self._stored.items() if u in uids}
        self._silent = {p: t for p, t in self._silent.items() if p in pods}
        await asyncio.sleep(max(0.0, began + seconds - time.monotonic()))

    def _is_due(self, gang: Gang, period: float) -> bool:
        """Whether to read a gang in this period: one that has not answered for long may take
        minutes more."""
        silent = time.monotonic() - self._silent.get(gang.pod_key, time.monotonic())
        return silent < SILENT_SECONDS or silent % SILENT_POLL_SECONDS < period

    async def _poll(self, session: aiohttp.ClientSession, gang: Gang) -> None:
        async with self._slots:
            try:
                progress = read_known(Progress, await self._read(session, gang))
            except (ApiError, aiohttp.ClientError, TimeoutError, ValueError) as error:
                log.debug("progress of %s/%s: %s", gang.namespace, gang.pod, error)
                self._silent.setdefault(gang.pod_key, time.monotonic())
                return
        self._silent.pop(gang.pod_key, None)
        if progress.run == gang.run:
            self._keep(gang.uid, progress)

    async def _read(self, session: aiohttp.ClientSession, gang: Gang) -> bytes:
        if self._proxy:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                return await self._cluster.pod_progress(gang.namespace, gang.pod, METRICS_PORT)
        host = f"[{gang.ip}]" if ":" in gang.ip else gang.ip
        url = f"http://{host}:{METRICS_PORT}/progress"
        # A user's image answers here: a redirect must not lead this process to other addresses.
        async with session.get(url, allow_redirects=False) as response:
            if response.status != 200:
                raise aiohttp.ClientPayloadError(f"status {response.status}")
            return await _read_all(response.content)

    def _keep(self, uid: str, progress: Progress) -> None:
        """Put progress into the store at most once in a while, a new stage immediately."""
        known, when, changed = self._stored.get(uid, (None, 0.0, datetime.now(UTC)))
        if known is not None and _comparable(known) == _comparable(progress):
            self._store.put_progress(uid, progress, changed)  # its account of the time goes on
            return
        now = time.monotonic()
        at_once = known is None or known.stage != progress.stage
        wait = 0.0 if at_once else when + self._write_seconds - now
        if wait > 0:
            return  # a later poll stores it
        changed = datetime.now(UTC)
        self._stored[uid] = (progress, now, changed)
        self._store.put_progress(uid, progress, changed)
        self._enqueue(uid, 0.0)


async def _read_all(body: aiohttp.StreamReader) -> bytes:
    """Read the body of a response, in any number of chunks, up to LARGEST_RESPONSE."""
    pieces = bytearray()
    async for piece in body.iter_any():
        pieces += piece
        if len(pieces) > LARGEST_RESPONSE:
            break  # a truncated body is not valid JSON
    return bytes(pieces)


def _comparable(progress: Progress) -> Progress:
    """Progress without the figures that change with time alone."""
    return progress.model_copy(update={"updated": 0.0, "time": None, "remaining_seconds": None})


def running_gangs(store: Store) -> Iterator[Gang]:
    """Pod 0 of every running gang."""
    for job in store.jobs():
        uid = job["metadata"]["uid"]
        for view in store.children(uid, "Pod").values():
            if not isinstance(view, PodView) or view.role != GANG or view.index != 0:
                continue
            if view.running and view.ip and view.deleted_by is None:
                yield Gang(uid, job["metadata"]["namespace"], view.run, view.name, view.ip)
