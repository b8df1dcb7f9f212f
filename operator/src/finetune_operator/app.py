"""One operator process: serve the probes, acquire the Lease, then watch and reconcile until the
Lease is lost, kopf ends or a signal arrives. A process that lost its Lease exits, so that its
successor starts with clean state."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Final

from finetune_operator import watch
from finetune_operator.cluster import Cluster, Credentials, load_credentials
from finetune_operator.config import Config
from finetune_operator.controller import Controller
from finetune_operator.lease import Lease
from finetune_operator.metrics import Metrics
from finetune_operator.progress import Poller
from finetune_operator.store import Store
from finetune_operator.warning_reader import WarningReader
from finetune_operator.web import serve
from finetune_operator.workqueue import WorkQueue

WORKERS: Final = 16

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """Options of the process."""

    config: Config
    kubeconfig: str | None
    context: str | None
    managed_by: str
    """Name of this operator: it works on jobs with this ``spec.managedBy``."""
    namespaces: tuple[str, ...]
    """Namespaces to watch; empty: all."""
    host: str
    port: int
    leader_election: bool
    lease_namespace: str
    lease_name: str
    proxy: bool | None
    """Whether to read progress through the API server's pod proxy; None: only outside a pod."""


class Operator:
    """The components of one process, and their state for the probes."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._store = Store(options.managed_by)
        self._queue = WorkQueue()
        self._metrics = Metrics(self._store, lambda: len(self._queue))
        self._instance = f"{socket.gethostname()}-{uuid.uuid4().hex[:6]}"
        self._not_ready: str | None = "not connected to the API server"
        self._unhealthy: str | None = None
        self._stop = asyncio.Event()

    async def run(self) -> int:
        """Run until stopped; return the exit code of the process."""
        self._handle_signals()
        web = await serve(
            self._options.host,
            self._options.port,
            self._metrics.registry,
            lambda: self._unhealthy,
            lambda: self._not_ready,
        )
        try:
            return await self._connected()
        finally:
            await web.cleanup()

    def _handle_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stop.set)

    async def _connected(self) -> int:
        configuration, in_cluster = load_credentials(
            self._options.kubeconfig, self._options.context
        )
        async with Cluster(configuration) as cluster:
            if not await self._unless_stopped(cluster.wait_until_served()):
                return 0
            self._not_ready = None  # a stand-by is ready too: it may take over at any time
            if not self._options.leader_election:
                return await self._lead(cluster, configuration, in_cluster, None)
            lease = Lease(
                cluster, self._options.lease_namespace, self._options.lease_name, self._instance
            )
            if not await self._unless_stopped(lease.acquire()):
                return 0
            cluster.guard = lease.may_write
            return await self._lead(cluster, configuration, in_cluster, lease)

    async def _unless_stopped(self, coroutine: Coroutine[Any, Any, None]) -> bool:
        """Await a coroutine until it ends or a stop signal arrives; return whether it ended
        first."""
        task = asyncio.create_task(coroutine)
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if not task.done():
            task.cancel()
            return False
        task.result()
        return not self._stop.is_set()

    async def _lead(
        self,
        cluster: Cluster,
        configuration: Credentials,
        in_cluster: bool,
        lease: Lease | None,
    ) -> int:
        store, queue, options = self._store, self._queue, self._options
        proxy = options.proxy if options.proxy is not None else not in_cluster
        controller = Controller(
            store, cluster, queue, options.config, self._metrics, self._instance
        )
        poller = Poller(store, cluster, queue.put_after, proxy)
        # When kopf ends, it cancels all tasks created after its start: create these tasks first.
        listing = watch.Listing()
        tasks = {asyncio.create_task(self._work(cluster, listing, controller))}
        tasks.add(asyncio.create_task(poller.run()))
        warnings = WarningReader(store, cluster, queue.put_after, options.config.node_conditions)
        tasks.add(asyncio.create_task(warnings.run()))
        sweep = watch.sweep(cluster, store, queue.put, options.namespaces, listing.relisted)
        tasks.add(asyncio.create_task(sweep))
        renewing = asyncio.create_task(lease.keep() if lease else asyncio.Event().wait())
        stopped = asyncio.create_task(self._stop.wait())
        watching = asyncio.create_task(
            watch.run(
                configuration, store, queue.put, listing, options.namespaces, self._handle_signals
            )
        )
        parts: set[asyncio.Task[Any]] = {*tasks, renewing, watching}
        await asyncio.wait(parts | {stopped}, return_when=asyncio.FIRST_COMPLETED)
        self._unhealthy = None if stopped.done() else "no longer working: see the log"
        _log_failures(parts)
        stopped.cancel()
        await _end(parts - {watching})
        if lease is not None:
            await lease.release()  # the workers have ended: no more writes
        await _end({watching})
        log.info("stopped")
        return 0 if self._unhealthy is None else 1

    async def _work(self, cluster: Cluster, listing: watch.Listing, controller: Controller) -> None:
        """Run the workers, once the store has everything that they need."""
        await listing.complete(cluster, self._options.namespaces)
        async with asyncio.TaskGroup() as workers:
            for _ in range(WORKERS):
                workers.create_task(self._queue.work(controller.handle))


def _log_failures(parts: set[asyncio.Task[Any]]) -> None:
    for task in parts:
        if task.done() and not task.cancelled() and task.exception() is not None:
            log.error("a part of the operator failed", exc_info=task.exception())


async def _end(tasks: set[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks, timeout=5)


def own_namespace() -> str:
    """Namespace of this pod, or ``default`` outside a cluster."""
    return os.environ.get("POD_NAMESPACE", "default")
