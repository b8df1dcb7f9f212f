"""``/progress`` of all gangs: one server for every pod, which the requested address tells apart."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web
from client import PODS, Client

from finetune_api import names


class Trainers:
    """The trainers of the running gangs. Each has taken another step whenever it is asked."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._runs: dict[str, str] = {}
        """Run of pod 0 of a gang, by address."""
        self._steps: dict[str, int] = {}
        self.reads = 0

    async def know(self) -> None:
        """Look up the addresses of the gangs' pods."""
        found = await self._client.send("GET", f"{PODS}?labelSelector={names.LABEL_ROLE}=train")
        for pod in found["items"]:
            self._runs[pod["status"]["podIP"]] = pod["metadata"]["labels"][names.LABEL_RUN]

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[None]:
        app = web.Application()
        app.router.add_get("/progress", self._answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "0.0.0.0", names.METRICS_PORT).start()
        try:
            yield
        finally:
            await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        assert request.transport is not None
        address = request.transport.get_extra_info("sockname")[0]
        run = self._runs.get(address)
        if run is None:
            raise web.HTTPNotFound
        self.reads += 1
        step = self._steps[address] = self._steps.get(address, 0) + 1
        return web.json_response(
            {
                "run": run,
                "attempt": 1,
                "restarts": 0,
                "stage": "Training",
                "step": step,
                "totalSteps": 1_000_000,
                "epoch": step / 1000,
                "loss": 1 + 1 / step,
                "learningRate": 1e-4,
                "tokensPerSecond": 1000.0 + step,
                "remainingSeconds": 3600.0,
                "updated": time.time(),
            }
        )
