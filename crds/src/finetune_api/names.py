"""Every string that several parts share: group, labels, paths, variables, exit codes."""

from __future__ import annotations

from enum import IntEnum
from typing import Final, Literal

GROUP: Final = "finetune-operator.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
KIND: Final = "FineTuneJob"
PLURAL: Final = "finetunejobs"
SINGULAR: Final = "finetunejob"
SHORT_NAMES: Final = ("ftj",)

FIELD_OWNER: Final = "finetune-operator"
"""Field manager of everything the operator applies."""

# --- labels: one set on every child -------------------------------------------------------------
LABEL_MANAGED_BY: Final = "app.kubernetes.io/managed-by"
MANAGED_BY: Final = "finetune-operator"
LABEL_NAME: Final = "app.kubernetes.io/name"
APP_NAME: Final = "finetune-trainer"
LABEL_JOB_UID: Final = f"{GROUP}/job-uid"
LABEL_JOB_NAME: Final = f"{GROUP}/job-name"
"""Name of the FineTuneJob, shortened to fit a label (63 characters); for users and selectors."""
LABEL_RUN: Final = f"{GROUP}/run"
LABEL_REVISION: Final = f"{GROUP}/revision"
LABEL_ROLE: Final = f"{GROUP}/role"
LABEL_QUEUE: Final = "kueue.x-k8s.io/queue-name"
ANNOTATION_MIN_PARALLELISM: Final = "kueue.x-k8s.io/job-min-parallelism"
ANNOTATION_COMPLETIONS_FOLLOW: Final = "kueue.x-k8s.io/job-completions-equal-parallelism"

Role = Literal["map", "prepare", "train", "publish"]
ROLES: Final[tuple[Role, ...]] = ("map", "prepare", "train", "publish")
"""Stages in order. ``map`` exists only if several pods map the data; prepare then reduces their
results."""

# --- inside a pod -------------------------------------------------------------------------------
CONTAINER: Final = "trainer"
RUN_SPEC_PATH: Final = "/etc/finetune/run-spec.json"
"""Mount path of the run spec (``finetune_api.run_spec.RunSpec``)."""
RUN_SPEC_KEY: Final = "run-spec.json"
PVC_ROOT: Final = "/var/run/finetune/pvc"
"""Claims of ``pvc://claim/path`` sources are mounted at ``PVC_ROOT/claim``."""
MODEL_CACHE: Final = "/var/cache/finetune"
"""The node's cache folder for model weights, if the operator is configured with one."""
SCRATCH: Final = "/var/run/finetune/scratch"
"""Writable emptyDir: HOME, TMPDIR, caches, the supervisor's files."""
TERMINATION_PATH: Final = "/var/run/finetune/termination/message"
METRICS_PORT: Final = 8000
METRICS_PORT_NAME: Final = "metrics"
RENDEZVOUS_PORT: Final = 29400
RENDEZVOUS_PORT_NAME: Final = "rendezvous"

ENV_RUN_SPEC: Final = "FINETUNE_RUN_SPEC"
"""Overrides RUN_SPEC_PATH."""
ENV_PVC_ROOT: Final = "FINETUNE_PVC_ROOT"
ENV_SCRATCH: Final = "FINETUNE_SCRATCH"
ENV_MODEL_CACHE: Final = "FINETUNE_MODEL_CACHE"
ENV_TERMINATION: Final = "FINETUNE_TERMINATION"
ENV_METRICS_PORT: Final = "FINETUNE_METRICS_PORT"
ENV_NODES: Final = "FINETUNE_NODES"
ENV_NODE_RANK: Final = "FINETUNE_NODE_RANK"
ENV_PROCESSES: Final = "FINETUNE_PROCESSES_PER_NODE"
ENV_RENDEZVOUS: Final = "FINETUNE_RENDEZVOUS"
"""host:port of the rendezvous store, in the pod of node rank 0."""
ENV_GRACE_SECONDS: Final = "FINETUNE_GRACE_SECONDS"
ENV_WORKER: Final = "JOB_COMPLETION_INDEX"
"""Index of a prepare worker, from 0; Kubernetes sets it in the pods of an Indexed Job."""


def storage_env(profile: int, key: str) -> str:
    """Return the environment variable of ``key`` (e.g. AWS_ACCESS_KEY_ID) of a storage profile."""
    return f"FINETUNE_STORAGE_{profile}_{key}"


SECRET_KEYS: Final[dict[str, bool]] = {
    "AWS_ACCESS_KEY_ID": True,
    "AWS_SECRET_ACCESS_KEY": True,
    "AWS_SESSION_TOKEN": False,
    "HF_TOKEN": False,
}
"""Keys that are read from a storage Secret, and whether each is required."""


ENV_JUDGE_KEY: Final = "FINETUNE_JUDGE_API_KEY"
"""Key of the judge's API, in the pod of publish."""
JUDGE_SECRET_KEY: Final = "API_KEY"
"""Its key in the Secret of ``evaluation.judge.secretRef``."""


# --- failures -----------------------------------------------------------------------------------
FailureClass = Literal[
    "UserError",
    "DataError",
    "OutOfMemory",
    "Diverged",
    "NodeFailure",
    "Preempted",
    "Stalled",
    "ImagePull",
    "Storage",
    "Unschedulable",
    "Quota",
    "Internal",
]


class ExitCode(IntEnum):
    """Exit codes of the trainer's containers. 10 to 19 are not retried (16 ends only its own pod:
    the attempt that fenced it continues)."""

    OK = 0
    USER_ERROR = 10
    DATA_ERROR = 11
    STORAGE_DENIED = 12
    DIVERGED = 13
    OUT_OF_MEMORY = 14
    INTERNAL = 15
    FENCED = 16
    """A newer attempt has taken the run; this one must not continue."""
    NODE_FAILURE = 20
    STORAGE_UNAVAILABLE = 21
    UNEXPECTED = 22
    """An error of unknown cause, possibly the node's: tried again before it is final."""
    INTERRUPTED = 23
    """Stopped by SIGTERM after its state was saved."""
    STALLED = 24
    HOST_OUT_OF_MEMORY = 25
    """Tried again: the memory of a host varies, while a GPU would run out of memory again."""


FINAL_EXIT_CODES: Final = tuple(int(c) for c in ExitCode if 10 <= c < 20)

# Condition types. Their reasons (``meanings.REASONS``) are API too: scripts match them.
Condition = Literal[
    "Prepared", "Running", "Evaluated", "Published", "Suspended", "Complete", "Failed",
    "Ready", "Reconciling", "Stalled",
]  # fmt: skip
Phase = Literal[
    "Pending", "Waiting", "Preparing", "Queued", "Starting", "Training", "Evaluating", "Publishing",
    "Suspended", "Complete", "Failed",
]  # fmt: skip
