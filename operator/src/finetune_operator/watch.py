"""kopf integration: watches feed the store and enqueue keys, by short handlers.

The handlers are coroutines (kopf runs plain functions in threads), so that store and queue need no
locks. There is one for each kind, and no ``index``: each handler of an object costs as much CPU
time as all the rest of its event, and with an index kopf would keep all objects in memory until the
last one was listed. ``on.event`` needs no finalizer and writes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection
from typing import Any, Final

import aiohttp
import kopf
import orjson
from kopf._cogs.clients import api as kopf_api

from finetune_api import names
from finetune_operator.cluster import ApiError, Cluster, Credentials, bearer
from finetune_operator.store import CHILD_KINDS, Store

SELECTOR: Final = f"{names.LABEL_MANAGED_BY}={names.MANAGED_BY}"
RESOURCES: Final[dict[str, tuple[str, str, str]]] = {
    names.KIND: (names.GROUP, names.VERSION, names.PLURAL),
    "ConfigMap": ("", "v1", "configmaps"),
    "Service": ("", "v1", "services"),
    "NetworkPolicy": ("networking.k8s.io", "v1", "networkpolicies"),
    "Job": ("batch", "v1", "jobs"),
    "Pod": ("", "v1", "pods"),
}
PAGE: Final = 250
"""Objects per page of a list: the size of the largest response."""
IDLE_SECONDS: Final = 1.0
"""How long kopf keeps the task of an object, and the object itself, after its last event."""
SWEEP_SECONDS: Final = 300.0
LISTED_SECONDS: Final = 2.0
"""Time from a new list of a kind to the sweep, so that one sweep follows lists of all kinds."""
DELIVERED_SECONDS: Final = 5.0
"""How long to wait for listed objects, which may be gone, before they are listed again."""

log = logging.getLogger(__name__)

kopf_api.json = orjson  # type: ignore[attr-defined]
"""kopf decodes each event by ``json.loads``, which takes a fifth of the operator's CPU time in a
burst of jobs; it has no setting for another library."""


class _NoDiffs(kopf.DiffBaseStorage):
    """Disables kopf's comparison of every object with its last handled state. It serves a kind of
    handler that this module does not have, and would copy each object several times and take most
    of the operator's CPU time."""

    def build(self, *, body: Any, extra_fields: Any = None) -> Any:
        return {}

    def fetch(self, *, body: Any) -> None:
        return None

    def store(self, *, body: Any, patch: Any, essence: Any) -> None:
        raise AssertionError("kopf must write nothing")


class _NoProgress(kopf.ProgressStorage):
    """Disables kopf's state of handlers that it retries: it retries none of this module."""

    def fetch(self, *, key: Any, body: Any) -> None:
        return None

    def store(self, *, key: Any, record: Any, body: Any, patch: Any) -> None:
        raise AssertionError("kopf must write nothing")

    def purge(self, *, key: Any, body: Any, patch: Any) -> None:
        return None

    def touch(self, *, body: Any, patch: Any, value: Any) -> None:
        return None

    def clear(self, *, essence: Any) -> Any:
        return essence


class Listing:
    """Whether the watches have delivered every object that existed when they began: before that, a
    pass would see only a part of a job's children."""

    def __init__(self) -> None:
        self._seen: set[str] | None = set()
        self.relisted = asyncio.Event()
        """Set by objects that come from a list instead of a watch."""

    def note(self, uid: str, relisted: bool = False) -> None:
        """Note that a watch, or its list, has delivered an object."""
        if self._seen is not None:
            self._seen.add(uid)
        if relisted:
            self.relisted.set()

    async def complete(self, cluster: Cluster, namespaces: Collection[str]) -> None:
        """Return once everything was delivered that exists now."""
        for kind in RESOURCES:
            for namespace in namespaces or (None,):
                while not await self._delivered(cluster, kind, namespace):
                    pass
        self._seen = None

    async def _delivered(self, cluster: Cluster, kind: str, namespace: str | None) -> bool:
        try:
            _, present = await cluster.versions(kind, namespace, _selector(kind))
        except (ApiError, aiohttp.ClientError, TimeoutError) as error:
            log.warning("list of %s: %s", kind, error)
            await asyncio.sleep(1)
            return False
        until = asyncio.get_running_loop().time() + DELIVERED_SECONDS
        while not present <= (self._seen or set()):
            if asyncio.get_running_loop().time() > until:
                return False
            await asyncio.sleep(0.05)
        return True


def _selector(kind: str) -> str:
    return "" if kind == names.KIND else SELECTOR


def registry(
    store: Store, enqueue: Callable[[str], None], listing: Listing
) -> kopf.OperatorRegistry:
    """A handler for every kind: put the object into the store, then enqueue its job."""
    handlers = kopf.OperatorRegistry()
    for kind, resource in RESOURCES.items():
        _register(handlers, kind, resource, store, enqueue, listing)
    return handlers


def _register(
    handlers: kopf.OperatorRegistry,
    kind: str,
    resource: tuple[str, str, str],
    store: Store,
    enqueue: Callable[[str], None],
    listing: Listing,
) -> None:
    @kopf.on.event(*resource, registry=handlers, id=f"see-{kind}")
    async def see(event: kopf.RawEvent, **_: Any) -> None:
        obj = event["object"]
        uid = store.remove(kind, obj) if event["type"] == "DELETED" else store.put(kind, obj)
        listing.note(obj["metadata"]["uid"], relisted=event["type"] is None)
        for key in [*filter(None, [uid]), *store.affected(kind, obj)]:
            enqueue(key)


def settings() -> kopf.OperatorSettings:
    """kopf settings: no writes to the cluster, and watches of the operator's own children only."""
    found = kopf.OperatorSettings()
    found.posting.enabled = False
    found.peering.standalone = True
    found.scanning.disabled = True
    found.networking.request_timeout = 30.0
    found.watching.chunk_size = PAGE
    found.queueing.idle_timeout = IDLE_SECONDS
    found.persistence.diffbase_storage = _NoDiffs()
    found.persistence.progress_storage = _NoProgress()
    for kind in CHILD_KINDS:
        found.watching.label_selectors[RESOURCES[kind]] = SELECTOR
    return found


def login(handlers: kopf.OperatorRegistry, configuration: Credentials) -> None:
    """Let kopf use the same credentials as the rest of the operator."""

    @kopf.on.login(registry=handlers)
    async def credentials(**_: Any) -> kopf.ConnectionInfo:
        return kopf.ConnectionInfo(
            server=configuration.host,
            ca_path=configuration.ssl_ca_cert,
            insecure=not configuration.verify_ssl,
            token=bearer(configuration),
            certificate_path=configuration.cert_file,
            private_key_path=configuration.key_file,
        )


async def run(
    configuration: Credentials,
    store: Store,
    enqueue: Callable[[str], None],
    listing: Listing,
    namespaces: Collection[str],
    handle_signals: Callable[[], None],
) -> None:
    """Watch until cancelled, or until kopf stops; the process should end then.

    kopf takes over the signals of the process; ``handle_signals`` takes them back.
    """
    handlers = registry(store, enqueue, listing)
    login(handlers, configuration)
    others = asyncio.all_tasks()
    tasks = await kopf.spawn_tasks(
        registry=handlers,
        settings=settings(),
        namespaces=list(namespaces),
        clusterwide=not namespaces,
    )
    handle_signals()
    await kopf.run_tasks(tasks, ignored=others)


async def sweep(
    cluster: Cluster,
    store: Store,
    enqueue: Callable[[str], None],
    namespaces: Collection[str],
    listed: asyncio.Event,
) -> None:
    """Remove objects from the store whose deletion no watch has reported.

    After an expired watch (410 Gone: the API server was restarted, or etcd was compacted) kopf
    lists again, but sends no event for objects that no longer exist. Therefore after each list
    (``listed`` is set), and every SWEEP_SECONDS, list the metadata of all the operator's objects,
    and remove those missing from the list.
    """
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SWEEP_SECONDS):
                await listed.wait()
        await asyncio.sleep(LISTED_SECONDS)
        listed.clear()
        for kind in RESOURCES:
            for namespace in namespaces or (None,):
                await _sweep_kind(cluster, store, enqueue, kind, namespace)


async def _sweep_kind(
    cluster: Cluster,
    store: Store,
    enqueue: Callable[[str], None],
    kind: str,
    namespace: str | None,
) -> None:
    try:
        version, present = await cluster.versions(kind, namespace, _selector(kind))
    except Exception as error:  # the next sweep lists again
        log.warning("sweep of %s: %s", kind, error)
        return
    for uid, known in store.versions(kind, namespace).items():
        if uid not in present and known <= version:
            for key in store.remove_missing(kind, uid):
                enqueue(key)
