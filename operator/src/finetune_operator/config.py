"""Settings of the operator process, and the constants of its policy."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Self

from finetune_api.names import GROUP

ANNOTATION_IMAGE: Final = f"{GROUP}/image"
"""On a run spec's ConfigMap: the trainer image of the run, which a newer operator must not
change."""
ANNOTATION_OUTCOME: Final = f"{GROUP}/outcome"
"""On a run spec's ConfigMap: the run's outcome, so that the run stays ended if status is lost."""
ANNOTATION_ACCESS: Final = f"{GROUP}/network-access"
"""On a NetworkPolicy: digest of the settings that it was rendered from."""
GRACE_SECONDS: Final = 120
"""terminationGracePeriodSeconds of pods of CPU stages, and the least of a gang's pods."""
LONGEST_GRACE_SECONDS: Final = 3600
"""Most that a gang's pods get without ``compute.terminationGracePeriodSeconds``."""
NODE_LOST_SECONDS: Final = 30
"""Seconds that pods stay bound to a node that is not ready or not reachable."""
STAGE_BACKOFF_LIMIT: Final = 3
"""Retries of a pod of map and prepare."""
PUBLISH_BACKOFF_LIMIT: Final = 11
"""Retries of publish: with the Job controller's delays (10 s, doubled up to 10 minutes) an hour, so
that a trained model outlasts an outage of storage."""
GANG_BACKOFF_LIMIT: Final = 2_147_483_647
"""Effectively unlimited: the Job controller counts pods, failurePolicy.maxRestarts counts
incidents."""
USER_ID: Final = 65532
"""User and group of every pod."""

HISTORY: Final = 10
"""Number of earlier runs kept in status.history, with their run specs."""

OVERDUE: Final = timedelta(seconds=30)
"""A terminating pod this long past its grace period counts as a pod on a dead node: the next gang
does not wait for it. The attempt number in HEAD.json fences its writes."""
PARTIAL_GANG_HOLDS: Final = timedelta(minutes=5)
"""How long pods of a gang hold nodes while others find none."""
LOST_AFTER: Final = timedelta(seconds=45)
"""How long a stage with a pod on an unreachable node may make no progress before its Job is
recreated."""
GANG_SHRINKS: Final = timedelta(minutes=5)
"""The same for an elastic gang that can go on without the pod: its supervisors notice the loss,
wait for a replacement, and load the model anew."""
LOST_ELSEWHERE: Final = timedelta(minutes=10)
"""After this time on an unreachable node a pod of an elastic gang is recreated, with the gang, so
that it finds another node. A node that restarts is back by then."""
AVOIDED_FOR: Final = timedelta(hours=4)
"""How long gangs of a run avoid a node on which it failed twice."""
AVOIDED_AT_MOST: Final = 8
"""Most nodes that a run avoids; the oldest entry is dropped."""
AVOIDANCE_HOLDS: Final = timedelta(minutes=2)
"""How long a pod may find no node while its gang avoids some: then they are used again."""
SIDECAR_ENDS: Final = timedelta(seconds=30)
"""How long other containers of a pod may run after the trainer's."""
GANG_LINGERS: Final = timedelta(seconds=60)
"""How long other pods of a gang may keep running after the first pod has reported the result."""
BUDGET_RESTORED_AFTER: Final = timedelta(minutes=30)
"""Training without a fault, with a new checkpoint, after which failurePolicy.maxRestarts counts
anew."""
POD_FAILURE_AWAITED: Final = timedelta(seconds=10)
"""How long to wait for the failed pods of a failed Job: watches of Jobs and of pods are not ordered
relative to each other."""
PULL_REFUSED: Final = timedelta(seconds=30)
"""How long an image pull that the registry refuses (no such image, no access) may fail."""
PULL_FAILING: Final = timedelta(minutes=10)
"""How long an image pull may fail for other causes (registry down, rate limit)."""
PODS_AWAITED: Final = timedelta(minutes=2)
"""How long a Job may lack pods before status shows it, unless an event says why: a busy Job
controller takes its time, and replaces a failed pod after a back-off."""
PODS_REPLACED: Final = timedelta(seconds=60)
"""Longest back-off of a Job controller before it replaces a failed pod; beyond, the gang is
recreated (``decision.recreate``)."""
START_AWAITED: Final = timedelta(seconds=20)
"""How long a container may take to start before status shows it."""
USAGE_STEP_SECONDS: Final = 30
"""Granularity at which running pods are charged, so that status is not written every second."""
USAGE_LAG: Final = timedelta(seconds=5)
"""How far behind the clock GPU time is counted: the end of a pod is seen some seconds late."""


@dataclass(frozen=True)
class NetworkAccess:
    """What the NetworkPolicies of runs allow besides the traffic within a gang, as in Kubernetes'
    NetworkPolicy."""

    metrics_from: tuple[dict[str, Any], ...] = ()
    """Peers (NetworkPolicyPeer) that may read the metrics port of a gang's pods; empty: all."""
    egress: tuple[dict[str, Any], ...] = ()
    """Allowed destinations (NetworkPolicyEgressRule) of all pods; empty: all."""

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read ``{"metricsFrom": [peer, …], "egress": [rule, …]}``, both optional.

        Raises:
            ValueError: the text is no such JSON object.
        """
        found = json.loads(text)
        if not isinstance(found, dict) or not found.keys() <= {"metricsFrom", "egress"}:
            raise ValueError("an object with metricsFrom and egress")
        lists = [found.get(key, []) for key in ("metricsFrom", "egress")]
        for items in lists:
            if not isinstance(items, list) or not all(isinstance(i, dict) for i in items):
                raise ValueError("metricsFrom and egress are lists of objects")
        return cls(*map(tuple, lists))

    @property
    def digest(self) -> str:
        text = json.dumps([self.metrics_from, self.egress], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Config:
    """Settings of one operator process that decisions depend on."""

    image: str
    """Trainer image of the operator's release, for jobs without ``compute.image``."""
    image_pull_policy: str | None = None
    """imagePullPolicy of every pod; None leaves it to Kubernetes."""
    model_cache: str | None = None
    """Folder on every node where gangs cache the weights of base models."""
    node_conditions: tuple[str, ...] = ()
    """Patterns of node conditions that are problems of the node: a gang avoids it after a pod's
    failure there. Empty: nodes are not looked at."""
    network: NetworkAccess | None = None
    """Settings of the NetworkPolicies; None: runs have none, and existing ones are deleted."""
