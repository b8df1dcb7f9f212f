"""In-memory cluster for the pure tests: jobs and children as the API server would show them,
changed by the plans that the operator would apply."""

from __future__ import annotations

import copy
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_api import names
from finetune_api.results import Progress, Termination
from finetune_operator.children.overlay import lay_over
from finetune_operator.children.render import render
from finetune_operator.config import Config, NetworkAccess
from finetune_operator.decide import decide
from finetune_operator.decision.plan import Create, Plan
from finetune_operator.world.children import StoredRunSpec
from finetune_operator.world.models import ModelJob, model_view
from finetune_operator.world.objects import format_time
from finetune_operator.world.observe import VIEWS, Refusal, View, observe
from finetune_operator.world.pods import INDEX_ANNOTATION, pod_view
from finetune_operator.world.references import References
from finetune_operator.world.stored import StoredJob

UID = "0f9c2e4a-1111-2222-3333-444455556666"
T0 = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
CONFIG = Config(image="registry.example/trainer:1", network=NetworkAccess())


def spec(**more: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "model": {"source": "s3://models/base"},
        "data": {"train": [{"source": "s3://data/train.jsonl"}]},
        "compute": {"nodes": 2, "gpusPerNode": 1},
        "output": {"destination": "s3://models/out"},
        "storage": {"secretRef": {"name": "s3"}},
    }
    laid: dict[str, Any] = lay_over(base, more)
    return laid


def stored_object(
    kind: str, uid: str, version: int, namespace: str = "team", **more: Any
) -> dict[str, Any]:
    """A FineTuneJob, or a child that the job ``UID`` controls."""
    meta: dict[str, Any] = {
        "uid": uid,
        "name": uid,
        "namespace": namespace,
        "resourceVersion": str(version),
    }
    if kind != names.KIND:
        owner = {"apiVersion": names.API_VERSION, "kind": names.KIND, "uid": UID}
        meta |= {
            "labels": {names.LABEL_JOB_UID: UID},
            "ownerReferences": [{**owner, "controller": True}],
        }
    return {"metadata": meta, **more}


class World:
    """One FineTuneJob and its children. ``pass_()`` is one pass of the operator."""

    def __init__(self, name: str = "bot", uid: str = UID, **more: Any) -> None:
        self.now = T0
        self.job: dict[str, Any] = {
            "metadata": {"name": name, "namespace": "team", "uid": uid, "generation": 1},
            "spec": spec(**more),
        }
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}
        self.progress: Progress | None = None
        self.progress_time: datetime | None = None
        self.gone: list[dict[str, Any]] = []
        self.pull_failing_since: dict[str, datetime] = {}
        self.warnings: dict[str, str] = {}
        self.node_problems: dict[str, str] = {}
        self.lacking: dict[str, datetime] = {}
        self.created = 0
        """Number of objects created."""
        self.refused: dict[str, Refusal] = {}
        self.config = CONFIG
        self.others: list[World] = []
        """Other jobs of the namespace."""

    # --- the operator ----------------------------------------------------------------------------

    def plan(self) -> Plan:
        found = observe(
            views={kind: self.views(kind) for kind in VIEWS},
            gone=filter(None, map(pod_view, self.gone)),
            pull_failing_since=self.pull_failing_since,
            warnings=self.warnings,
            node_problems=self.node_problems,
            progress=self.progress,
            progress_time=self.progress_time if self.progress else None,
            refused=self.refused,
            models=self.models(),
        )
        since = self.lacking
        self.lacking = {name: since.get(name, self.now) for name in found.lacking_pods()}
        found = replace(found, lacks_pods_since=self.lacking)
        return decide(StoredJob(self.job), found, self.now, self.config)

    def views(self, kind: str) -> dict[str, View | None]:
        return {o["metadata"].get("uid", ""): VIEWS[kind](o) for o in self.of(kind)}

    def models(self) -> list[ModelJob]:
        """Views of the jobs whose models this job waits for."""
        references = References()
        for world in (self, *self.others):
            references.put(world.job)
        by_name = {world.job["metadata"]["name"]: world for world in self.others}
        chain = [by_name[job["metadata"]["name"]] for job in references.chain(self.job)]
        return [model_view(world.job, world.run_specs()) for world in chain]

    def run_specs(self) -> list[StoredRunSpec]:
        return [v for v in self.views("ConfigMap").values() if isinstance(v, StoredRunSpec)]

    def pass_(self) -> Plan:
        plan = self.plan()
        for delete in plan.delete:
            self.objects.pop((delete.kind, delete.name), None)
            if delete.kind == "Job":
                self.end_pods_of(delete.name)
        for obj in render(plan, self.config):
            obj["metadata"]["creationTimestamp"] = format_time(self.now)
            self.created += 1
            obj["metadata"]["uid"] = f"{obj['metadata']['name']}-{self.created}"
            self.objects[obj["kind"], obj["metadata"]["name"]] = copy.deepcopy(obj)
        for change in plan.change:
            old = self.objects[change.kind, change.name]
            self.objects[change.kind, change.name] = lay_over(old, change.patch)
        if plan.status is not None:
            self.job["status"] = plan.status
        return plan

    def settle(self) -> Plan:
        """Run passes until a plan has no action; a plan that never settles is a defect."""
        for _ in range(6):
            plan = self.pass_()
            if not (plan.delete or plan.create or plan.change or plan.status):
                return plan
        raise AssertionError(f"does not settle: {plan}")

    def settle_and_list(self) -> list[Create]:
        """``settle``, and return what was created."""
        found: list[Create] = []
        for _ in range(6):
            plan = self.pass_()
            found += plan.create
        return found

    # --- users -----------------------------------------------------------------------------------

    def edit(self, **more: Any) -> None:
        self.job["spec"] = lay_over(self.job["spec"], more)
        self.job["metadata"]["generation"] += 1

    # --- Kubernetes ------------------------------------------------------------------------------

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [o for (k, _), o in self.objects.items() if k == kind]

    def names(self, kind: str) -> list[str]:
        return sorted(n for k, n in self.objects if k == kind)

    def child(self, role: str) -> dict[str, Any]:
        found = [j for j in self.of("Job") if j["metadata"]["labels"][names.LABEL_ROLE] == role]
        assert len(found) == 1, self.names("Job")
        return found[0]

    def wait(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def pods(self, role: str, count: int = 1, **state: Any) -> list[dict[str, Any]]:
        """Create or replace pods of the role's Job; ``state`` is the state of their container."""
        job = self.child(role)
        job.setdefault("status", {}).setdefault("startTime", format_time(self.now))
        return [self.pod(job, index, **state) for index in range(count)]

    def pod(self, job: dict[str, Any], index: int = 0, suffix: str = "x", **state: Any) -> Any:
        name = f"{job['metadata']['name']}-{index}-{suffix}"
        template = job["spec"]["template"]
        made = self.objects.get(("Pod", name)) or {
            "kind": "Pod",
            "metadata": {
                "name": name,
                "namespace": self.job["metadata"]["namespace"],
                "uid": name,
                "ownerReferences": [
                    {
                        "apiVersion": "batch/v1",
                        "kind": "Job",
                        "uid": job["metadata"]["uid"],
                        "controller": True,
                    }
                ],
                "labels": template["metadata"]["labels"],
                "annotations": {INDEX_ANNOTATION: str(index)},
                "creationTimestamp": format_time(self.now),
            },
            "spec": {**template["spec"], "nodeName": f"node-{index}"},
        }
        scheduled = {
            "type": "PodScheduled",
            "status": "True",
            "lastTransitionTime": format_time(self.now),
        }
        conditions = made.get("status", {}).get("conditions", [scheduled])
        phase = "Pending"
        if "running" in state:
            phase = "Running"
            state["running"] = {"startedAt": format_time(self.now)}
        if "terminated" in state:
            ended = state["terminated"]
            phase = "Succeeded" if ended.get("exitCode") == 0 else "Failed"
            old = made.get("status", {}).get("containerStatuses", [{}])[0].get("state", {})
            ended.setdefault("startedAt", old.get("running", {}).get("startedAt"))
            ended.setdefault("finishedAt", format_time(self.now))
        container = {"name": names.CONTAINER, "state": state}
        made["status"] = {
            "phase": phase, "podIP": "10.0.0.1", "containerStatuses": [container],
            "conditions": conditions,
        }  # fmt: skip
        self.objects["Pod", name] = made
        return made

    def end_pods_of(self, job: str) -> None:
        for pod in [p for p in self.of("Pod") if p["metadata"]["name"].startswith(f"{job}-")]:
            pod["metadata"].setdefault("deletionTimestamp", format_time(self.now))

    def remove_pods(self) -> None:
        for pod in self.of("Pod"):
            self.objects.pop(("Pod", pod["metadata"]["name"]))

    def condition(self, role: str, type_: str, reason: str = "") -> None:
        conditions = self.child(role).setdefault("status", {}).setdefault("conditions", [])
        conditions.append({"type": type_, "status": "True", "reason": reason})

    # --- the trainer -----------------------------------------------------------------------------

    def finish(self, role: str, **said: Any) -> None:
        message = Termination.model_validate({"run": self.run["id"], "role": role, **said})
        nodes = self.child(role)["spec"]["completions"]
        for pod in self.pods(role, nodes, terminated={"exitCode": 0}):
            state = pod["status"]["containerStatuses"][0]["state"]
            state["terminated"]["message"] = message.to_text()
        self.condition(role, "Complete")

    def fail(self, role: str, code: int, index: int = 0, suffix: str = "x", **failure: Any) -> Any:
        ended: dict[str, Any] = {"exitCode": code}
        if failure:
            message = Termination.model_validate(
                {"run": self.run["id"], "role": role, "failure": failure}
            )
            ended["message"] = message.to_text()
        return self.pod(self.child(role), index, suffix, terminated=ended)

    def report(self, stage: str = "Training", **more: Any) -> None:
        raw = {"run": self.run["id"], "attempt": 1, "restarts": 0, "stage": stage, **more}
        self.progress = Progress.model_validate(raw)
        self.progress_time = self.now

    # --- status ----------------------------------------------------------------------------------

    @property
    def status(self) -> dict[str, Any]:
        return self.job["status"]  # type: ignore[no-any-return]

    @property
    def run(self) -> dict[str, Any]:
        return self.status["run"]  # type: ignore[no-any-return]

    def condition_of(self, type_: str) -> str | None:
        found = [c for c in self.status["conditions"] if c["type"] == type_]
        return f"{found[0]['status']}/{found[0]['reason']}" if found else None

    def message(self, type_: str) -> str:
        return str(next(c["message"] for c in self.status["conditions"] if c["type"] == type_))


PREPARED = {
    "digest": "d1",
    "uri": "s3://models/out/.workspace/data/d1",
    "reused": False,
    "trainSamples": 90,
    "validationSamples": 5,
    "testSamples": 5,
    "trainTokens": 9000,
    "supervisedTokens": 3000,
    "totalSteps": 30,
}
SCORES = {"name": "test", "samples": 5, "base": {"Loss": 2.0}, "tuned": {"Loss": 0.5}}
TRAINED = {
    "attempt": 1,
    "restarts": 0,
    "steps": 30,
    "loss": 0.5,
    "checkpoint": "s3://models/out/.workspace/runs/bot/1/attempt-1/step-00000030",
    "scores": [SCORES],
    "trainingSeconds": 60.0,
    "trainableParameters": 10,
    "totalParameters": 1000,
}
COMPARED = {
    "Loss": {
        "effect": -1.5,
        "low": -1.75,
        "high": -1.25,
        "p": 0.01,
        "test": "SignFlip",
        "verdict": "Better",
    },
}
PUBLISHED = {
    "uri": "s3://models/out/1-0f9c2",
    "digest": "sha",
    "formats": ["adapter"],
    "bytes": 7,
    "fullCopyBytes": 1980,
    "scores": [{**SCORES, "comparisons": COMPARED}],
    "mainResult": {
        "dataSet": "test", "metric": "Loss", "value": "0.5 (0.3, 0.7)", "verdict": "Better",
        "gain": "-1.5 (-1.8, -1.2)", "currentGap": -0.25,
    },
}  # fmt: skip


def at_training(**more: Any) -> World:
    """A world with a running gang."""
    world = World(**more)
    train(world)
    return world


def train(world: World) -> None:
    """Advance a world until its gang runs."""
    world.settle()
    world.finish("prepare", prepared=PREPARED)
    world.settle()
    world.wait(5)
    world.pods("train", world.job["spec"]["compute"]["nodes"], running={})
    world.settle()


def completed(**more: Any) -> World:
    """A world with a complete run."""
    world = at_training(**more)
    complete(world)
    return world


def complete(world: World, **published: Any) -> None:
    """Advance a world with a running gang to a complete run."""
    world.wait(60)
    world.finish("train", trained=TRAINED)
    world.settle()
    world.finish("publish", published=PUBLISHED | published)
    world.settle()
