"""The Job of each stage. What the stages differ in is a row each in ``STAGE_JOBS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from finetune_api import names
from finetune_api.identity import child_name
from finetune_api.names import FINAL_EXIT_CODES, ExitCode, Role
from finetune_api.spec import FineTuneJobSpec
from finetune_operator.children.metadata import Json, labels_of, metadata
from finetune_operator.children.podspec import StagePod, pod_template
from finetune_operator.config import GANG_BACKOFF_LIMIT, STAGE_BACKOFF_LIMIT, Config
from finetune_operator.decision.plan import CurrentRun, Subject
from finetune_operator.decision.stages import GANG


@dataclass(frozen=True)
class StageJob:
    """What is special about the Job of a stage."""

    arguments: Callable[[FineTuneJobSpec], list[str]]
    """Command of the trainer that its pods run."""
    pods: Callable[[FineTuneJobSpec], Json]
    """Fields of the Job's spec: how many pods, and how often each may fail."""


def _one_pod(spec: FineTuneJobSpec) -> Json:
    return {"completions": 1, "parallelism": 1, "backoffLimit": STAGE_BACKOFF_LIMIT}


def _workers(spec: FineTuneJobSpec) -> Json:
    """Tries are counted by worker: a failure that all have at once (storage that is down) costs
    each of them one, and a worker that fails every time ends the stage soon."""
    limits = {"backoffLimitPerIndex": STAGE_BACKOFF_LIMIT, "maxFailedIndexes": 0}
    return _indexed(spec.prepare.workers) | limits


def _prepare(spec: FineTuneJobSpec) -> list[str]:
    """All of it, or what is left behind a map."""
    return ["prepare", "--reduce"] if spec.prepare.workers > 1 else ["prepare"]


def _gang(spec: FineTuneJobSpec) -> Json:
    return _indexed(spec.compute.nodes) | {"backoffLimit": GANG_BACKOFF_LIMIT}


def _indexed(pods: int) -> Json:
    return {"completionMode": "Indexed", "completions": pods, "parallelism": pods}


STAGE_JOBS: Final[dict[Role, StageJob]] = {
    "map": StageJob(lambda spec: ["prepare", "--map"], _workers),
    "prepare": StageJob(_prepare, _one_pod),
    "train": StageJob(lambda spec: ["supervise"], _gang),
    "publish": StageJob(lambda spec: ["publish"], _one_pod),
}


def stage_job(subject: Subject, run: CurrentRun, role: Role, config: Config) -> Json:
    """The Job of a stage. One for a queue is made suspended, and from then on left to Kueue."""
    spec, stage = run.run_spec.spec, STAGE_JOBS[role]
    labels = labels_of(subject, run, role)
    meta = metadata(subject, child_name(subject.name, run.id, role, run.revision), labels)
    pod = StagePod(subject, run, role, stage.arguments(spec), labels, config)
    body: Json = {
        **stage.pods(spec),
        "podFailurePolicy": _pod_failure_policy(),
        "template": pod_template(pod),
    }
    if role == GANG and spec.scheduling.queue_name is not None:
        meta["labels"] = labels | {names.LABEL_QUEUE: spec.scheduling.queue_name}
        body["suspend"] = True
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": meta, "spec": body}


def _pod_failure_policy() -> Json:
    """A final exit code ends the Job; a pod that Kubernetes took away counts as no failure.

    The first rule that matches decides: a drained pod that ends with a final code has failed. A
    fenced pod is left over from an earlier attempt and must not end the attempt that fenced it.
    """
    return {
        "rules": [
            {
                "action": "Ignore",
                "onExitCodes": {
                    "containerName": names.CONTAINER,
                    "operator": "In",
                    "values": [int(ExitCode.FENCED)],
                },
            },
            {
                "action": "FailJob",
                "onExitCodes": {
                    "containerName": names.CONTAINER,
                    "operator": "In",
                    "values": [c for c in FINAL_EXIT_CODES if c != ExitCode.FENCED],
                },
            },
            {
                "action": "Ignore",
                "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
            },
        ]
    }
