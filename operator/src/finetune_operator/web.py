"""``/healthz``, ``/readyz`` and ``/metrics``, served before all other parts and independently of
them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

Check = Callable[[], str | None]
"""Returns a description of the problem, or None."""


async def serve(
    host: str, port: int, registry: CollectorRegistry, healthy: Check, ready: Check
) -> web.AppRunner:
    """Start the server; ``cleanup()`` of the returned runner ends it.

    Raises:
        OSError: the port is taken.
    """

    async def metrics(_: web.Request) -> web.Response:
        body = generate_latest(registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.router.add_get("/healthz", _probe(healthy))
    app.router.add_get("/readyz", _probe(ready))
    app.router.add_get("/metrics", metrics)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    return runner


def _probe(check: Check) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def probe(_: web.Request) -> web.StreamResponse:
        wrong = check()
        return web.Response(text=wrong or "ok", status=503 if wrong else 200)

    return probe
