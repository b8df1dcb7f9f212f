"""Warnings of Kubernetes about pods that do not start and Jobs that lack pods: only Events name the
missing volume, the network plug-in's error or the exceeded quota. Kueue's words about queued Jobs,
and problems of the nodes of failed pods.

All are read on demand, because a watch of all Events of a cluster would be its largest.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple

import aiohttp

from finetune_operator.cluster import ApiError, Cluster
from finetune_operator.decision.incidents import end_of, is_incident
from finetune_operator.decision.stages import GANG
from finetune_operator.store import Store
from finetune_operator.world.children import JobView
from finetune_operator.world.pods import PodView

LOOK_SECONDS: Final = 3.0
AGAIN_SECONDS: Final = 15.0
"""Time between two reads about the same object."""
QUEUE_AGAIN_SECONDS: Final = 60.0
"""The same about a queued Job: it may wait for days beside a thousand others."""
REFUSED_SECONDS: Final = 600.0
"""How long Kueue or nodes are not asked after a refusal: Kueue is not installed, or the right is
missing."""
READING_SHARE: Final = 0.05
"""Most of the time that goes into reading Events: the API server looks through all Events of a
namespace for each list."""
SUSPECTED: Final = timedelta(minutes=2)
"""How long after a pod's failure its node is looked at: agents notice problems with a delay."""
LATE: Final = timedelta(seconds=5)
"""How long a pod may take to start, or a Job to make its pods, before its warnings are read."""
_AT_REST: Final = ("Training", "Evaluating", "Complete", "Failed", "Suspended", "Waiting")
"""Phases in which every pod has started, or none is wanted."""

log = logging.getLogger(__name__)


class Late(NamedTuple):
    """A pod that does not start or has failed, or a Job that lacks pods or is queued."""

    job: str
    """uid of the FineTuneJob."""
    namespace: str
    uid: str
    queued: bool = False
    failed_on: str | None = None
    """Node of a failed pod."""


class WarningReader:
    """Reads the newest warning about each late object, and enqueues its FineTuneJob if the warning
    is new."""

    def __init__(
        self,
        store: Store,
        cluster: Cluster,
        enqueue: Callable[[str, float], None],
        node_conditions: Sequence[str] = (),
    ) -> None:
        """
        Args:
            node_conditions: patterns of the node conditions that count; without any, nodes are not
                looked at.
        """
        self._store, self._cluster, self._enqueue = store, cluster, enqueue
        self._node_conditions = node_conditions
        self._read_at: dict[str, float] = {}
        self._events_from = 0.0
        """When Events may be listed again."""
        self._refused_until = {"queues": 0.0, "nodes": 0.0}

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
        if self._node_conditions:
            late += failed_pods(self._store, now)
        uids = {each.uid for each in late}
        for uid in self._read_at.keys() - uids:
            self._store.drop_warning(uid)
        self._read_at = {uid: at for uid, at in self._read_at.items() if uid in uids}
        unstarted = defaultdict[str, dict[str, str]](dict)
        for each in late:
            if not self._is_due(each):
                continue
            if not each.queued and not each.failed_on:
                unstarted[each.namespace][each.uid] = each.job
                continue
            self._read_at[each.uid] = time.monotonic()
            with self._logged(each.namespace):
                await self._read(each)
        for namespace, jobs in unstarted.items():
            if time.monotonic() < self._events_from:
                break
            self._read_at |= dict.fromkeys(jobs, time.monotonic())
            with self._logged(namespace):
                await self._read_events(namespace, jobs)

    def _is_due(self, late: Late) -> bool:
        again = QUEUE_AGAIN_SECONDS if late.queued else AGAIN_SECONDS
        return time.monotonic() - self._read_at.get(late.uid, -again) >= again

    @contextlib.contextmanager
    def _logged(self, namespace: str) -> Iterator[None]:
        """A failed request has no consequence."""
        try:
            yield
        except (ApiError, aiohttp.ClientError, TimeoutError) as error:
            log.debug("warnings in %s: %s", namespace, error)

    async def _read_events(self, namespace: str, jobs: dict[str, str]) -> None:
        """Read the newest warning about each object of a namespace (uid → uid of its
        FineTuneJob), all in one list: in a burst of jobs hundreds of objects are late at once."""
        began = time.monotonic()
        try:
            found = await self._cluster.newest_warnings(namespace, jobs.keys())
        finally:
            now = time.monotonic()
            self._events_from = now + (now - began) / READING_SHARE
        for uid, text in found.items():
            if self._store.put_warning(uid, text):
                self._enqueue(jobs[uid], 0.0)

    async def _read(self, late: Late) -> None:
        """Read what Kueue says about a queued Job, or the problems of a failed pod's node."""
        if late.failed_on:
            problems = self._cluster.node_problems(late.failed_on, self._node_conditions)
            text, put = await self._optional("nodes", problems), self._store.put_node_problem
        else:
            words = self._cluster.queue_message(late.namespace, late.uid)
            text, put = await self._optional("queues", words), self._store.put_warning
        if text is not None and put(late.uid, text):
            self._enqueue(late.job, 0.0)

    async def _optional(self, what: str, request: Coroutine[Any, Any, str | None]) -> str | None:
        """Send a request for which the right may be missing."""
        if time.monotonic() < self._refused_until[what]:
            request.close()
            return None
        try:
            return await request
        except ApiError as error:
            if error.code == 403 or (error.code == 404 and what == "queues"):
                self._refused_until[what] = time.monotonic() + REFUSED_SECONDS
            raise


def failed_pods(store: Store, now: datetime) -> Iterator[Late]:
    """Pods of gangs that have failed a short while ago."""
    for job in store.jobs():
        uid, namespace = job["metadata"]["uid"], job["metadata"]["namespace"]
        for pod, view in store.children(uid, "Pod").items():
            if not isinstance(view, PodView) or view.role != GANG or not is_incident(view):
                continue
            if view.node and now - end_of(view) < SUSPECTED:
                yield Late(uid, namespace, pod, failed_on=view.node)


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
