"""Settings of the operator process, and the constants of its policy."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from finetune_api.names import GROUP

ANNOTATION_IMAGE: Final = f"{GROUP}/image"
"""On a run spec: the trainer image of the run, which a newer operator must not change."""
ANNOTATION_OUTCOME: Final = f"{GROUP}/outcome"
"""On a run spec: the run's outcome, so that the run stays ended where status is lost."""
ANNOTATION_RESTARTS: Final = f"{GROUP}/restarts-before"
"""On a run spec: incidents of earlier revisions that do not count against this one."""

ANNOTATION_SUSPENDED: Final = f"{GROUP}/suspended"
"""On a Job: the operator suspended it for spec.suspend. A Job that another (a queue) has suspended
is left alone."""

GRACE_SECONDS: Final = 120
"""terminationGracePeriodSeconds of every pod, and the trainer's time to save its state."""
NODE_LOST_SECONDS: Final = 30
"""How long pods stay bound to a node that is not ready or cannot be reached."""
STAGE_BACKOFF_LIMIT: Final = 3
"""Tries of a CPU stage's pod after the first."""
GANG_BACKOFF_LIMIT: Final = 2_147_483_647
"""Out of reach: the Job controller counts pods, failurePolicy.maxRestarts counts incidents."""
USER_ID: Final = 65532
"""User and group of every pod."""

HISTORY: Final = 10
"""Earlier runs that status.history and their orders keep."""

OVERDUE: Final = timedelta(seconds=30)
"""A terminating pod this long past its grace period counts as one on a dead node: the next gang
does not wait for it (what it writes is fenced by the attempt in HEAD.json)."""
GANG_LINGERS: Final = timedelta(seconds=60)
"""How long other pods of a gang may live on after its first one has left the result."""
POD_FAILURE_AWAITED: Final = timedelta(seconds=10)
"""How long the failed pods of a failed Job may be unseen: watches of Jobs and pods are in no common
order."""
PULL_REFUSED: Final = timedelta(seconds=30)
"""How long a pull may fail that the registry refuses (no such image, no access)."""
PULL_FAILING: Final = timedelta(minutes=10)
"""How long a pull may fail for other causes (registry down, rate limit)."""
PODS_AWAITED: Final = timedelta(seconds=10)
"""How long a Job may be without pods before status shows it."""
USAGE_STEP_SECONDS: Final = 30
"""Running pods are charged in steps of this length, so that status is not written every second."""


@dataclass(frozen=True)
class Config:
    """Settings of one operator process that decisions depend on."""

    image: str
    """Trainer image of the operator's release, for jobs without ``compute.image``."""
    image_pull_policy: str | None = None
    """imagePullPolicy of every pod; None leaves it to Kubernetes."""
    model_cache: str | None = None
    """Folder of every node in which gangs keep the weights of base models."""
