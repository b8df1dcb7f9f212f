"""The Job of each stage. ``STAGE_JOBS`` has one entry per stage with its differences."""

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
from finetune_operator.config import (
    GANG_BACKOFF_LIMIT,
    PUBLISH_BACKOFF_LIMIT,
    STAGE_BACKOFF_LIMIT,
    Config,
)
from finetune_operator.decision.plan import CurrentRun, Subject
from finetune_operator.decision.stages import GANG


@dataclass(frozen=True)
class StageJob:
    """The stage-specific parts of a Job."""

    arguments: Callable[[FineTuneJobSpec], list[str]]
    """Trainer command of the pods."""
    pods: Callable[[FineTuneJobSpec], Json]
    """Fields of the Job's spec: the number of pods, and how often each may fail."""


def _one_pod(tries: int) -> Callable[[FineTuneJobSpec], Json]:
    return lambda spec: {"completions": 1, "parallelism": 1, "backoffLimit": tries}


def _workers(spec: FineTuneJobSpec) -> Json:
    """Retries are counted per worker: a failure of all workers (a storage outage) costs each of
    them one, and a worker that always fails ends the stage early."""
    limits = {"backoffLimitPerIndex": STAGE_BACKOFF_LIMIT, "maxFailedIndexes": 0}
    return _indexed(spec.prepare.workers) | limits


def _prepare(spec: FineTuneJobSpec) -> list[str]:
    """All of prepare, or only the reduce if a map stage precedes it."""
    return ["prepare", "--reduce"] if spec.prepare.workers > 1 else ["prepare"]


def _gang(spec: FineTuneJobSpec) -> Json:
    return _indexed(spec.compute.nodes) | {"backoffLimit": GANG_BACKOFF_LIMIT}


def _indexed(pods: int) -> Json:
    return {"completionMode": "Indexed", "completions": pods, "parallelism": pods}


STAGE_JOBS: Final[dict[Role, StageJob]] = {
    "map": StageJob(lambda spec: ["prepare", "--map"], _workers),
    "prepare": StageJob(_prepare, _one_pod(STAGE_BACKOFF_LIMIT)),
    "train": StageJob(lambda spec: ["supervise"], _gang),
    "publish": StageJob(lambda spec: ["publish"], _one_pod(PUBLISH_BACKOFF_LIMIT)),
}


def stage_job(subject: Subject, run: CurrentRun, role: Role, config: Config) -> Json:
    """Build the Job of a stage. With a queue, the Job is created suspended; from then on Kueue
    controls it."""
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
        if spec.compute.effective_min_nodes < spec.compute.nodes:
            meta["annotations"] = _partial_admission(spec.compute.effective_min_nodes)
        body["suspend"] = True
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": meta, "spec": body}


def _partial_admission(fewest: int) -> dict[str, str]:
    """Annotations by which Kueue may admit an elastic gang with fewer pods. Kueue lowers
    completions with parallelism, and so leaves out the last indexes."""
    return {
        names.ANNOTATION_MIN_PARALLELISM: str(fewest),
        names.ANNOTATION_COMPLETIONS_FOLLOW: "true",
    }


def _pod_failure_policy() -> Json:
    """Pod failure policy: a final exit code ends the Job; a pod that Kubernetes disrupted is no
    failure.

    The first matching rule decides: a drained pod that exits with a final code has failed. A fenced
    pod belongs to an earlier attempt and must not end the attempt that fenced it.
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
