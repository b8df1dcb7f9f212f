"""Warnings of Kubernetes about pods that do not start and Jobs that lack pods: only Events name the
missing volume, the network plug-in's error or the exceeded quota. Kueue's words about queued Jobs.

Events are read on demand, because a watch of all Events of a cluster would be its largest.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple

import aiohttp

from finetune_operator.cluster import ApiError, Cluster
from finetune_operator.store import Store
from finetune_operator.world.children import JobView
from finetune_operator.world.pods import PodView

LOOK_SECONDS: Final = 3.0
AGAIN_SECONDS: Final = 15.0
"""Time between two reads about the same object."""
QUEUE_AGAIN_SECONDS: Final = 60.0
"""The same about a queued Job: it may wait for days beside a thousand others."""
NO_QUEUES_SECONDS: Final = 600.0
"""How long Kueue is not asked after a refusal: it is not installed, or the right is missing."""
LATE: Final = timedelta(seconds=5)
"""How long a pod may take to start, or a Job to make its pods, before its warnings are read."""
_AT_REST: Final = ("Training", "Complete", "Failed", "Suspended", "Waiting")
"""Phases in which every pod has started, or none is wanted."""

log = logging.getLogger(__name__)


class Late(NamedTuple):
    """A pod that does not start, or a Job that lacks pods or is queued."""

    job: str
    """uid of the FineTuneJob."""
    namespace: str
    uid: str
    queued: bool = False


class WarningReader:
    """Reads the newest warning about each late object, and enqueues its FineTuneJob if the warning
    is new."""

    def __init__(
        self, store: Store, cluster: Cluster, enqueue: Callable[[str, float], None]
    ) -> None:
        self._store, self._cluster, self._enqueue = store, cluster, enqueue
        self._read_at: dict[str, float] = {}
        self._no_queues_until = 0.0

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            try:
                await self.look(datetime.now(UTC))
            except Exception:  # odd objects of one job must not end the operator
                log.exception("reading warnings")
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self, now: datetime) -> None:
        """Look once."""
        late = list(late_objects(self._store, now))
        uids = {each.uid for each in late}
        for uid in self._read_at.keys() - uids:
            self._store.drop_warning(uid)
        self._read_at = {uid: at for uid, at in self._read_at.items() if uid in uids}
        for each in late:
            again = QUEUE_AGAIN_SECONDS if each.queued else AGAIN_SECONDS
            if time.monotonic() - self._read_at.get(each.uid, -again) >= again:
                self._read_at[each.uid] = time.monotonic()
                await self._read(each)

    async def _read(self, late: Late) -> None:
        try:
            text = await self._text(late)
        except (ApiError, aiohttp.ClientError, TimeoutError) as error:
            log.debug("events of %s/%s: %s", late.namespace, late.uid, error)
            return
        if text is not None and self._store.put_warning(late.uid, text):
            self._enqueue(late.job, 0.0)

    async def _text(self, late: Late) -> str | None:
        if not late.queued:
            return await self._cluster.newest_warning(late.namespace, late.uid)
        if time.monotonic() < self._no_queues_until:
            return None
        try:
            return await self._cluster.queue_message(late.namespace, late.uid)
        except ApiError as error:
            if error.code in (403, 404):
                self._no_queues_until = time.monotonic() + NO_QUEUES_SECONDS
            raise


def late_objects(store: Store, now: datetime) -> Iterator[Late]:
    """Pods that do not start, and Jobs that lack pods or are queued."""
    for job in store.jobs():
        if (job.get("status") or {}).get("phase") in _AT_REST:
            continue
        uid, namespace = job["metadata"]["uid"], job["metadata"]["namespace"]
        pods = {u: v for u, v in store.children(uid, "Pod").items() if isinstance(v, PodView)}
        for pod, view in pods.items():
            if view.is_starting and now - view.created >= LATE:
                yield Late(uid, namespace, pod)
        for child, found in store.children(uid, "Job").items():
            if not isinstance(found, JobView):
                continue
            if found.in_queue:
                yield Late(uid, namespace, child, queued=True)
            if not found.makes_pods:
                continue
            own = [v for v in pods.values() if (v.role, v.run, v.revision) == found.stage]
            if found.missing(own) and now - (found.started or found.created) >= LATE:
                yield Late(uid, namespace, child)
