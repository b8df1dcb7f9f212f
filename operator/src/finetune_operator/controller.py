"""``reconcile(uid)``: one pass, observe → decide → render → apply → report. It may be called at any
time and any number of times."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import aiohttp

from finetune_api.names import KIND
from finetune_operator.children.render import render
from finetune_operator.cluster import ApiError, Cluster, NotLeading
from finetune_operator.config import Config
from finetune_operator.decide import decide, defect
from finetune_operator.decision.plan import Plan
from finetune_operator.metrics import Metrics
from finetune_operator.store import Store
from finetune_operator.workqueue import WorkQueue
from finetune_operator.world.observe import Refusal

REFUSED_SECONDS = 15.0
"""Delay until a refused child is applied again."""

log = logging.getLogger(__name__)


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

    async def handle(self, uid: str) -> bool:
        """Run ``reconcile`` for a worker; return False if the pass must be retried with backoff."""
        began = time.monotonic()
        try:
            await self.reconcile(uid)
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
        return True

    def _failed(self, uid: str, error: BaseException) -> bool:
        gone = isinstance(error, ApiError) and error.code == 404
        if gone and self._store.job(uid) is None:
            return True
        self._metrics.reconcile_errors.inc()
        log.warning("reconcile of %s: %s", uid, error)
        return False

    async def reconcile(self, uid: str) -> None:
        """Bring one job closer to its spec.

        If ``decide`` or ``render`` raises, report the defect in status and re-raise.

        Raises:
            ApiError, aiohttp.ClientError, TimeoutError: the API server refused a request or could
                not be reached; earlier writes stay, and the next pass continues from them.
        """
        job = self._store.job(uid)
        if job is None:
            self._queue.forget(uid)
            return
        now = datetime.now(UTC)
        try:
            plan = decide(job, self._store.observed(uid), now, self._config)
            children = render(plan, self._config)
        except Exception as error:
            await self._report(job, defect(job, error, now))
            raise
        accepted = await self._apply(plan, children)
        await self._report(job, plan)
        if not accepted:
            self._queue.put_after(uid, REFUSED_SECONDS)
        elif plan.requeue_after is not None:
            self._queue.put_after(uid, plan.requeue_after.total_seconds())

    async def _apply(self, plan: Plan, children: list[dict[str, Any]]) -> bool:
        """Apply deletions, creations and changes; return False if the API server refused a child (a
        podTemplate field that only the server can validate, or a full quota)."""
        namespace = plan.subject.namespace
        for delete in plan.delete:
            await self._cluster.delete(delete.kind, namespace, delete.name)
        for obj in children:
            if not await self._create(plan.subject.uid, obj):
                return False
        for change in plan.change:
            stored = await self._cluster.patch(change.kind, namespace, change.name, change.patch)
            self._store.put(change.kind, stored)
        return True

    async def _create(self, uid: str, obj: dict[str, Any]) -> bool:
        """Apply a child; on a refusal, record it in the store and return False."""
        name = obj["metadata"]["name"]
        known = self._store.refusal(uid, name)
        try:
            self._store.put(obj["kind"], await self._cluster.apply(obj))
        except ApiError as error:
            if error.code not in (400, 403, 422):
                raise
            refusal = Refusal(str(error), final=error.code != 403)
            self._store.put_refusal(uid, name, refusal)
            if known != refusal:
                self._queue.put(uid)  # the next pass shows the refusal in status
            return False
        self._store.put_refusal(uid, name, None)
        return True

    async def _report(self, job: Mapping[str, Any], plan: Plan) -> None:
        """Write a changed status, then create its events."""
        if plan.status is None:
            return
        stored = await self._cluster.apply_status(plan.subject, plan.status)
        self._store.put(KIND, stored)
        self._metrics.note(job.get("status") or {}, plan.status)
        for event in plan.events:
            await self._cluster.event(plan.subject, event, self._instance)
