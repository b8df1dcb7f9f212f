"""Leader election on a Lease, with a hard deadline: a leader that may have been replaced writes
nothing.

The holder renews every ``RENEW_SECONDS``. It counts as leader only until ``DEADLINE_SECONDS`` after
the *start* of its last successful renewal, by its own monotonic clock. Candidates wait
``DURATION_SECONDS`` from the time at which they saw the Lease change, by their own clocks, so that
another process leads at most RENEW + DURATION seconds after the last renewal of one that died.
Requests end within ``cluster.REQUEST_SECONDS`` <= DURATION - DEADLINE, so no write ends after
another leader began.
"""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import UTC, datetime
from typing import Any, Final

import aiohttp

from finetune_operator.cluster import ApiError, Cluster, collection_path, object_path

DURATION_SECONDS: Final = 15
DEADLINE_SECONDS: Final = 10.0
RENEW_SECONDS: Final = 2.0

log = logging.getLogger(__name__)


class Lease:
    """One candidate for one Lease."""

    def __init__(self, cluster: Cluster, namespace: str, name: str, identity: str) -> None:
        self._cluster = cluster
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._leader_until = 0.0
        self._seen: tuple[str, float] | None = None
        self._expires = 0.0

    def may_write(self) -> bool:
        """Whether this process is certainly the leader."""
        return time.monotonic() < self._leader_until

    async def acquire(self) -> None:
        """Return once this process leads: it tries again when the Lease expires, at the latest."""
        while not await self._try():
            left = self._expires - time.monotonic()
            await asyncio.sleep(min(left, RENEW_SECONDS) if left > 0 else RENEW_SECONDS)
        log.info("leading: lease %s/%s", self._namespace, self._name)

    async def keep(self) -> None:
        """Renew until the Lease is lost or may be lost; then return."""
        while self.may_write():
            await asyncio.sleep(min(RENEW_SECONDS, max(0.0, self._leader_until - time.monotonic())))
            await self._try()
        log.error("lease %s/%s is lost: writing stops", self._namespace, self._name)

    async def release(self) -> None:
        """Release the Lease, so that the next leader need not wait."""
        if not self.may_write():
            return
        self._leader_until = 0.0
        try:
            lease = await self._get()
            if lease is not None and lease["spec"].get("holderIdentity") == self._identity:
                lease["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1}
                await self._put(lease)
        except (ApiError, aiohttp.ClientError, TimeoutError) as error:
            log.warning("lease was not released: %s", error)

    async def _try(self) -> bool:
        """Take or renew the Lease once; return False if another process holds it or the server
        fails."""
        began = time.monotonic()
        try:
            if not await self._write():
                self._leader_until = 0.0
                return False
        except (ApiError, aiohttp.ClientError, TimeoutError) as error:
            log.warning("lease: %s", error)
            return False
        self._leader_until = began + DEADLINE_SECONDS
        return self.may_write()

    async def _write(self) -> bool:
        lease = await self._get()
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        if lease is None:
            return await self._create(now)
        spec = lease.setdefault("spec", {})
        holder = spec.get("holderIdentity")
        if holder and holder != self._identity and not self._expired(lease):
            return False
        if holder != self._identity:
            spec["leaseTransitions"] = spec.get("leaseTransitions", 0) + 1
            spec["acquireTime"] = now
        spec |= {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": DURATION_SECONDS,
            "renewTime": now,
        }
        return await self._put(lease)

    def _expired(self, lease: dict[str, Any]) -> bool:
        """Whether the holder has not renewed for the Lease's duration, by this process's clock."""
        version = lease["metadata"]["resourceVersion"]
        if self._seen is None or self._seen[0] != version:
            self._seen = (version, time.monotonic())
        wait = float(lease["spec"].get("leaseDurationSeconds") or DURATION_SECONDS)
        self._expires = self._seen[1] + wait
        return time.monotonic() >= self._expires

    async def _get(self) -> dict[str, Any] | None:
        try:
            path = object_path("Lease", self._namespace, self._name)
            return await self._cluster.request("GET", path)
        except ApiError as error:
            if error.code == 404:
                return None
            raise

    async def _create(self, now: str) -> bool:
        body = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self._name, "namespace": self._namespace},
            "spec": {
                "holderIdentity": self._identity,
                "leaseDurationSeconds": DURATION_SECONDS,
                "acquireTime": now,
                "renewTime": now,
                "leaseTransitions": 0,
            },
        }
        return await self._conditional("POST", collection_path("Lease", self._namespace), body)

    async def _put(self, lease: dict[str, Any]) -> bool:
        """Replace the Lease that was read, unless it has changed since: the body has its
        resourceVersion."""
        path = object_path("Lease", self._namespace, self._name)
        return await self._conditional("PUT", path, lease)

    async def _conditional(self, method: str, path: str, body: dict[str, Any]) -> bool:
        try:
            await self._cluster.request(method, path, body)
        except ApiError as error:
            if error.code == 409:
                return False
            raise
        return True
