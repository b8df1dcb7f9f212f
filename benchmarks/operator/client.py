"""A small asynchronous client of the API server, and the FineTuneJobs of the loads."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Self

import aiohttp

from finetune_api import names
from finetune_operator.cluster import load_credentials, ssl_context

Json = dict[str, Any]
NAMESPACE = "default"
JOBS = f"apis/batch/v1/namespaces/{NAMESPACE}/jobs"
PODS = f"api/v1/namespaces/{NAMESPACE}/pods"
FINETUNEJOBS = f"apis/{names.API_VERSION}/namespaces/{NAMESPACE}/{names.PLURAL}"
METADATA = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
AGENT = "benchmark"
CONCURRENT = 32
"""Requests of a client at the same time."""


class Client:
    """A client with the rights of a kubeconfig. Use as an async context manager."""

    def __init__(self, kubeconfig: Path) -> None:
        self._configuration, _ = load_credentials(str(kubeconfig), None)
        self._slots = asyncio.Semaphore(CONCURRENT)

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(ssl=ssl_context(self._configuration), limit=0)
        self._session = aiohttp.ClientSession(
            base_url=self._configuration.host + "/",
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None),
            headers={"User-Agent": AGENT},
            read_bufsize=2**20,
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._session.close()

    async def send(self, method: str, path: str, body: Json | None = None) -> Json:
        """Send one request; raises aiohttp.ClientResponseError with the server's message."""
        async with self._slots, self._session.request(method, path, json=body) as response:
            answer: Json = await response.json()
            if response.status >= 400:
                raise aiohttp.ClientResponseError(
                    response.request_info, (), status=response.status, message=answer["message"]
                )
            return answer

    async def watch(
        self, path: str, accept: str = "application/json", **parameters: str
    ) -> AsyncIterator[tuple[str, Json]]:
        """Events of a watch, type and object, until cancelled. A server under load ends watches; a
        new one begins with ADDED for all objects."""
        query = {"watch": "1", "resourceVersion": "0", "timeoutSeconds": "3600", **parameters}
        headers = {"Accept": accept}
        while True:
            async with self._session.get(path, params=query, headers=headers) as response:
                if response.status == 429:  # its cache of a new resource is being filled
                    await asyncio.sleep(0.2)
                    continue
                response.raise_for_status()
                async for line in response.content:
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        break
                    yield event["type"], event["object"]


def finetunejob(name: str, nodes: int) -> Json:
    """A small FineTuneJob."""
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": name},
        "spec": {
            "model": {"source": "s3://models/base"},
            "data": {"train": [{"source": "s3://data/train.jsonl"}]},
            "compute": {"nodes": nodes, "gpusPerNode": 1},
            "output": {"destination": f"s3://models/{name}"},
            "storage": {"secretRef": {"name": "s3"}},
        },
    }
