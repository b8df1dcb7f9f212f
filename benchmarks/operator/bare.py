"""The same children without an operator: a client that makes them itself.

For every job it creates the run spec's ConfigMap and the Job of prepare. When that has succeeded it
creates the gang's Service and Job: four writes. The objects are those that the operator
renders, without owner references (their owner does not exist).
"""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import replace
from datetime import UTC, datetime

from client import JOBS, METADATA, NAMESPACE, Client, Json, finetunejob
from observer import Observer
from operator_process import IMAGE

from finetune_api import names
from finetune_operator.children.render import render
from finetune_operator.config import Config
from finetune_operator.decide import decide
from finetune_operator.decision.plan import Create
from finetune_operator.world.observe import Observed
from finetune_operator.world.stored import StoredJob

_CONFIG = Config(image=IMAGE)
_PATHS = {
    "ConfigMap": f"api/v1/namespaces/{NAMESPACE}/configmaps",
    "Service": f"api/v1/namespaces/{NAMESPACE}/services",
    "Job": JOBS,
}


class Bare:
    """Makes the children of jobs. Use ``create`` for each job while ``follow`` runs."""

    def __init__(self, client: Client, observer: Observer, nodes: int) -> None:
        self._client, self._observer, self._nodes = client, observer, nodes
        self._later: dict[str, list[Json]] = {}

    async def create(self, name: str) -> None:
        """Create the ConfigMap and the Job of prepare of one job."""
        config_map, prepare, service, train = _children(finetunejob(name, self._nodes))
        self._later[name] = [service, train]
        self._observer.asked[name] = time.monotonic()
        for child in (config_map, prepare):
            await self._create(child)

    async def follow(self) -> None:
        """Create each gang once its prepare has succeeded, until cancelled."""
        selector = f"{names.LABEL_MANAGED_BY}={names.MANAGED_BY},{names.LABEL_ROLE}=prepare"
        done = self._client.watch(
            JOBS, METADATA, labelSelector=selector, fieldSelector="status.successful=1"
        )
        async with asyncio.TaskGroup() as tasks:  # a failure ends all
            async for _, job in done:
                children = self._later.pop(job["metadata"]["labels"][names.LABEL_JOB_NAME], None)
                if children is not None:
                    tasks.create_task(self._create(*children))

    async def _create(self, *children: Json) -> None:
        for child in children:
            await self._client.send("POST", _PATHS[child["kind"]], child)


def _children(job: Json) -> list[Json]:
    """The ConfigMap, the Job of prepare, the Service and the gang's Job of a FineTuneJob."""
    meta = {"namespace": NAMESPACE, "uid": str(uuid.uuid4()), "generation": 1}
    job = job | {"metadata": job["metadata"] | meta}
    plan = decide(StoredJob(job), Observed(), datetime.now(UTC), _CONFIG)
    gang = (Create("Service", "train"), Create("Job", "train"))
    children = render(replace(plan, create=(*plan.create, *gang)), _CONFIG)
    for child in children:
        del child["metadata"]["ownerReferences"]
    return children
