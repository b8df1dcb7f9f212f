"""``reconcile(uid)``: one pass, observe → decide → render → apply → report. It may be called at any
time and any number of times."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import aiohttp

from finetune_api.names import KIND
from finetune_operator.children.render import render
from finetune_operator.cluster import ApiError, Cluster, NotLeading
from finetune_operator.config import Config
from finetune_operator.decide import decide, defect
from finetune_operator.decision.plan import Plan, Subject, Urgency
from finetune_operator.metrics import Metrics
from finetune_operator.store import Store
from finetune_operator.workqueue import LAST_BACKOFF, WorkQueue
from finetune_operator.world.observe import Refusal, child_key
from finetune_operator.world.stored import StoredJob

SETTLE_SECONDS: Final = 3.0
"""Shortest time from one status write of a job to the next, unless that is due at once."""
SETTLE_LATENCIES: Final = 50.0
"""Added to it in multiples of the time that a status write takes lately: most of what a busy API
server has to do in a burst of jobs are status writes."""
REST_LATENCIES: Final = 10.0
"""How much longer a job rests between two passes, in multiples of the same time."""
_SMOOTHING: Final = 0.2
"""Weight of the newest write in the mean time of a write."""
GATHER_SECONDS: Final = 1.0
"""Time from a change that is due soon to its write: another one often follows."""
GATHER_LATER_SECONDS: Final = 60.0
"""The same for a change that is due later."""
REFUSED_SECONDS: Final = 15.0
"""Delay until a refused request is sent again, for ``UNCHANGED_FOR_A_WHILE``."""
UNCHANGED_FOR_A_WHILE: Final = (400, 403, 422)
"""HTTP statuses of an invalid child, and of a quota or policy: other statuses are retried with
backoff from a fraction of a second on."""

_LONG_AGO: Final = datetime.min.replace(tzinfo=UTC)

T = TypeVar("T")
log = logging.getLogger(__name__)


class ChildRefused(Exception):
    """The API server refused a request about a child."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(str(error))
        self.error = error


class WatchBehind(Exception):
    """A child to create exists already: the watches are behind, and the plan is out of date."""


class Controller:
    """Reconciler over a store, a cluster and a queue of job uids."""

    def __init__(
        self,
        store: Store,
        cluster: Cluster,
        queue: WorkQueue,
        config: Config,
        metrics: Metrics,
        instance: str,
    ) -> None:
        self._store = store
        self._cluster = cluster
        self._queue = queue
        self._config = config
        self._metrics = metrics
        self._instance = instance
        self._written: dict[str, datetime] = {}
        """When status was last written, by uid."""
        self._latency = 0.0
        """Mean time of a status write lately, in seconds."""
        self._changed: dict[str, datetime] = {}
        """Since when a change of status waits to be written, by uid."""

    async def handle(self, uid: str) -> bool:
        """Run ``reconcile`` for a worker; return False if the pass must be retried with backoff."""
        began = time.monotonic()
        try:
            return await self.reconcile(uid)
        except WatchBehind as behind:
            log.info("reconcile of %s: %s", uid, behind)
            return False
        except NotLeading as error:
            log.warning("not the leader, write skipped: %s", error)
            return True
        except (ApiError, aiohttp.ClientError, TimeoutError) as error:
            return self._failed(uid, error)
        except Exception as error:  # a worker must survive a defect in the pass of one job
            log.exception("reconcile of %s", uid)
            return self._failed(uid, error)
        finally:
            self._metrics.reconcile_seconds.observe(time.monotonic() - began)

    def _failed(self, uid: str, error: BaseException) -> bool:
        gone = isinstance(error, ApiError) and error.code == 404
        if gone and self._store.job(uid) is None:
            return True
        self._metrics.reconcile_errors.inc()
        log.warning("reconcile of %s: %s", uid, str(error) or type(error).__name__)
        return False

    async def reconcile(self, uid: str) -> bool:
        """Bring one job closer to its spec. A request about a child that the API server refuses is
        shown in status; later requests of the pass wait for it.

        If ``decide`` or ``render`` raises, report the defect in status and re-raise.

        Returns:
            False if the pass must be retried with backoff.

        Raises:
            ApiError, aiohttp.ClientError, TimeoutError: the status could not be written, or the API
                server could not be reached; earlier writes stay, and the next pass continues from
                them.
        """
        job = self._store.job(uid)
        if job is None:
            self._queue.forget(uid)
            self._written.pop(uid, None)
            self._changed.pop(uid, None)
            return True
        now = datetime.now(UTC)
        try:
            plan = decide(job, self._store.observed(uid), now, self._config)
            children = render(plan, self._config)
        except Exception as error:
            await self._report(job, defect(job, error, now))
            raise
        try:
            await self._apply(plan, children)
        except ChildRefused as refused:
            shown = decide(job, self._store.observed(uid), now, self._config)
            await self._report(job, replace(shown, urgency="AtOnce"))
            return self._retry(uid, refused)
        written = await self._report(job, plan)
        if (written and plan.urgency == "AtOnce") or plan.delete or plan.change:
            self._queue.put(uid)  # the next pass sees the writes of this one: no event causes it
        elif children:
            self._queue.put_after(uid, SETTLE_SECONDS)  # should nothing come of them
        if plan.requeue_after is not None:
            self._queue.put_after(uid, plan.requeue_after.total_seconds())
        return True

    def _retry(self, uid: str, refused: ChildRefused) -> bool:
        """Schedule the next pass after a refusal; return False if it is due after the backoff."""
        self._metrics.reconcile_errors.inc()
        log.warning("reconcile of %s: %s", uid, refused.error)
        seconds = refused.error.retry_after
        if seconds is None and refused.error.code in UNCHANGED_FOR_A_WHILE:
            seconds = REFUSED_SECONDS
        if seconds is None:
            return False
        self._queue.put_after(uid, min(seconds, LAST_BACKOFF))
        return True

    async def _apply(self, plan: Plan, children: list[dict[str, Any]]) -> None:
        """Apply deletions, creations and changes.

        Raises:
            ChildRefused: the API server refused a request about a child.
            WatchBehind: a child to create exists already.
        """
        cluster, subject = self._cluster, plan.subject
        namespace = subject.namespace
        for delete in plan.delete:
            known = self._store.children(subject.uid, delete.kind)
            found = (u for u, v in known.items() if v is not None and v.name == delete.name)
            if (uid := next(found, None)) is None:
                continue  # its deletion has been told during this pass
            deletion = cluster.delete(delete.kind, namespace, delete.name, uid)
            await self._accepted(subject, delete.kind, delete.name, deletion)
        for jobs in (False, True):  # pods need the other children
            made = [self._make(subject, c) for c in children if (c["kind"] == "Job") == jobs]
            for error in await asyncio.gather(*made, return_exceptions=True):
                if error is not None:
                    raise error
        for change in plan.change:
            patch = cluster.patch(change.kind, namespace, change.name, change.patch)
            changed = await self._accepted(subject, change.kind, change.name, patch)
            if changed is not None:  # None: it is gone
                self._store.put(change.kind, changed)

    async def _make(self, subject: Subject, child: dict[str, Any]) -> None:
        """Create a child, or change a NetworkPolicy that exists with other settings (``Create``).

        Raises:
            ChildRefused, WatchBehind: as ``_apply``.
        """
        kind, name = child["kind"], child["metadata"]["name"]
        views = self._store.children(subject.uid, kind).values()
        existing = {view.name for view in views if view is not None}
        request = self._cluster.apply(child) if name in existing else self._create(subject, child)
        # An invalid NetworkPolicy is the fault of the operator's settings, not of the job.
        final = kind != "NetworkPolicy"
        stored = await self._accepted(subject, kind, name, request, final_if_invalid=final)
        self._store.put(kind, stored)

    async def _create(self, subject: Subject, child: dict[str, Any]) -> dict[str, Any]:
        """Create a child. If the job has it already, the answer to an earlier request was lost and
        no watch has told yet: the next pass decides again, knowing it."""
        kind, meta = child["kind"], child["metadata"]
        try:
            return await self._cluster.create(child)
        except ApiError as error:
            if error.code != 409:
                raise
            found = await self._cluster.get(kind, meta["namespace"], meta["name"])
            if found is None or self._store.put(kind, found) != subject.uid:
                raise
            raise WatchBehind(f"{kind} {meta['name']} exists already") from None

    async def _accepted(
        self,
        subject: Subject,
        kind: str,
        name: str,
        request: Awaitable[T],
        final_if_invalid: bool = False,
    ) -> T:
        """Return the response to a request about a child; record whether it was refused.

        Args:
            final_if_invalid: whether no later request can succeed if the child is invalid.

        Raises:
            ChildRefused: the API server refused it.
        """
        child = child_key(kind, name)
        try:
            response = await request
        except ApiError as error:
            final = final_if_invalid and error.code in (400, 422)
            text = f"{child}: {error.code} {error.text}"
            self._store.put_refusal(subject.uid, child, Refusal(text, final))
            raise ChildRefused(error) from None
        self._store.put_refusal(subject.uid, child, None)
        return response

    def _wait(self, uid: str, urgency: Urgency, now: datetime) -> float:
        """Seconds until a changed status is written."""
        if urgency == "AtOnce":
            return 0.0
        gather = GATHER_SECONDS if urgency == "Soon" else GATHER_LATER_SECONDS
        busy = SETTLE_LATENCIES * self._latency
        written = (now - self._written.get(uid, _LONG_AGO)).total_seconds()
        changed = (now - self._changed.setdefault(uid, now)).total_seconds()
        if written < 0 or changed < 0:  # the clock was set back
            return 0.0
        return max(SETTLE_SECONDS + busy - written, gather + busy - changed)

    async def _report(self, job: StoredJob, plan: Plan) -> bool:
        """Write a changed status, then create its events. What is not due at once is written by a
        later pass, together with what follows. Returns whether status was written."""
        uid, now = plan.subject.uid, datetime.now(UTC)
        if plan.status is None:
            self._changed.pop(uid, None)
            return False
        if not job.raw_status and self._queue.new:
            self._queue.put(uid)  # the first Jobs of other new jobs come before this one's status
            return False
        if (wait := self._wait(uid, plan.urgency, now)) > 0:
            self._queue.put_after(uid, wait)
            return False
        self._changed.pop(uid, None)
        self._written[uid] = now
        began = time.monotonic()
        stored = await self._cluster.apply_status(plan.subject, plan.status)
        self._latency += _SMOOTHING * (time.monotonic() - began - self._latency)
        self._queue.longer_rest = REST_LATENCIES * self._latency
        self._store.put(KIND, stored)
        self._metrics.note(job.raw_status or {}, plan.status)
        for event in plan.events:
            await self._cluster.event(plan.subject, event, self._instance)
        return True
