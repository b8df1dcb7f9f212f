"""A proxy in front of an API server that fails as asked: it refuses, delays or loses requests,
repeats watch events, and calls back at each write (to kill the operator there).

The operator talks plain HTTP to it; the proxy has the administrator's certificate.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
from aiohttp import web

from cluster.control_plane import ControlPlane
from ports import free_port

WRITES = ("POST", "PUT", "PATCH", "DELETE")
_ADDED = ("Content-Type", "User-Agent")
_DROPPED = ("host", "content-length", "transfer-encoding", "connection", "accept-encoding")


@dataclass(frozen=True)
class Call:
    """One request of the operator."""

    method: str
    path: str
    """Path and query."""

    @property
    def is_write(self) -> bool:
        return self.method in WRITES and not self.is_lease

    @property
    def is_lease(self) -> bool:
        return "/leases" in self.path

    @property
    def is_watch(self) -> bool:
        return "watch=" in self.path


@dataclass
class Fault:
    """What the proxy does with a request. The default passes it on."""

    status: int | None = None
    """Answer with this HTTP status; the API server never sees the request."""
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    """Seconds until the request is passed on."""
    hang: bool = False
    """Never answer."""
    lose: bool = False
    """Pass the request on, and close the connection instead of answering."""
    afterwards: Callable[[], None] | None = None
    """Called once the API server has carried the request out, before its answer is passed on."""
    repeat_events: bool = False
    """Send each event of a watch twice."""
    expired: bool = False
    """Answer a watch with an event that says 410 Gone."""


class FaultyApi:
    """The proxy, in a thread of its own. Use as a context manager.

    Args:
        fault_of: decides on each request; called in the proxy's thread.
    """

    def __init__(
        self, plane: ControlPlane, fault_of: Callable[[Call], Fault | None] = lambda _: None
    ) -> None:
        self.plane = plane
        self.fault_of = fault_of
        self.calls: list[Call] = []
        """The writes that have arrived, in order."""
        self.port = free_port()
        self._watches: set[asyncio.Transport] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._start())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._do(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def kubeconfig(self, path: Path) -> Path:
        """Write a kubeconfig for the proxy."""
        name = "proxy"
        server = {"server": f"http://127.0.0.1:{self.port}"}
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": name,
            "clusters": [{"name": name, "cluster": server}],
            "users": [{"name": name, "user": {"token": "none"}}],
            "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
        }  # fmt: skip
        path.write_text(json.dumps(config))
        return path

    def cut_watches(self) -> None:
        """Close the connections of all watches, those that hang too."""
        self._do(self._cut_watches())

    async def _cut_watches(self) -> None:
        for transport in self._watches:
            transport.abort()
        self._watches.clear()

    def _do(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    async def _start(self) -> None:
        pki = self.plane.authority.folder
        trust = ssl.create_default_context(cafile=str(self.plane.authority.certificate))
        trust.load_cert_chain(pki / "admin.crt", pki / "admin.key")
        timeout = aiohttp.ClientTimeout(total=None)
        self._client = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=trust, limit=0), timeout=timeout,
            auto_decompress=False,
        )  # fmt: skip
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(
            app, shutdown_timeout=0.1, access_log=None, handler_cancellation=True
        )
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def _stop(self) -> None:
        await self._runner.cleanup()
        await self._client.close()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        call = Call(request.method, request.path_qs)
        body = await request.read()
        if call.is_write:
            self.calls.append(call)
        if call.is_watch and request.transport is not None:
            self._watches.add(request.transport)  # type: ignore[arg-type]
        fault = self.fault_of(call) or Fault()
        if fault.hang:
            await asyncio.sleep(3600)
        await asyncio.sleep(fault.delay)
        if fault.status is not None:
            text = json.dumps({"kind": "Status", "message": "refused by the test's proxy"})
            return web.Response(status=fault.status, text=text, headers=fault.headers)
        if fault.expired and call.is_watch:
            return await self._expired(request)
        try:
            return await self._pass_on(request, call, body, fault)
        except (aiohttp.ClientError, ConnectionError):  # the API server or the operator is away
            _cut(request)
            return web.Response(status=502)

    async def _pass_on(
        self, request: web.Request, call: Call, body: bytes, fault: Fault
    ) -> web.StreamResponse:
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _DROPPED}
        headers.pop("Authorization", None)
        url = f"{self.plane.server}{call.path}"
        async with self._client.request(
            call.method, url, data=body or None, headers=headers, skip_auto_headers=_ADDED
        ) as upstream:
            if call.is_watch and upstream.status == 200:
                return await self._stream(request, upstream, fault.repeat_events)
            raw = await upstream.read()
            if fault.afterwards is not None:
                fault.afterwards()
            if fault.lose:
                _cut(request)
            kept = {k: v for k, v in upstream.headers.items() if k.lower() not in _DROPPED}
            return web.Response(status=upstream.status, body=raw, headers=kept)

    async def _stream(
        self, request: web.Request, upstream: aiohttp.ClientResponse, repeat: bool
    ) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "application/json"})
        await answer.prepare(request)
        rest = b""
        async for piece in upstream.content.iter_any():
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                await answer.write((line + b"\n") * (2 if repeat else 1))
        return answer

    async def _expired(self, request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "application/json"})
        await answer.prepare(request)
        gone = {"kind": "Status", "apiVersion": "v1", "code": 410, "reason": "Expired"}
        event = {"type": "ERROR", "object": gone | {"message": "too old resource version"}}
        await answer.write(json.dumps(event).encode() + b"\n")
        return answer


def _cut(request: web.Request) -> None:
    """Close the connection without an answer."""
    if request.transport is not None:
        request.transport.abort()
