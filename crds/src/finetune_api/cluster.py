"""Spec blocks for cluster resources: the gang, the CPU stages, scheduling, restarts."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import Field, StringConstraints

from finetune_api.base import (
    CamelWord,
    Count,
    DnsLabel,
    DnsName,
    Model,
    Rule,
    Spelling,
)
from finetune_api.failures import CLASSES, ROWS, allowed_actions
from finetune_api.names import FailureClass

Quantity = Annotated[
    str,
    Spelling(
        r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti|P|Pi|E|Ei|e[0-9]+)?$",
        'a quantity of Kubernetes: 4, "500m", 16Gi',
        max_length=32,
        or_integer=True,
    ),
]
_SUFFIXES: Final = {
    "": 1, "m": Fraction(1, 1000), **{unit: 1000**i for i, unit in enumerate("kMGTPE", start=1)},
    **{f"{unit}i": 1024**i for i, unit in enumerate("KMGTPE", start=1)},
}  # fmt: skip


def bytes_of(quantity: str) -> int:
    """Return the value of a Kubernetes quantity, rounded down: ``16Gi`` is 17179869184."""
    if "e" in quantity:
        return int(Fraction(quantity))
    number = quantity.rstrip("".join(_SUFFIXES))
    return int(Fraction(number) * _SUFFIXES[quantity[len(number) :]])


QualifiedName = Annotated[str, StringConstraints(min_length=1, max_length=317)]
LabelValue = Annotated[str, StringConstraints(max_length=63)]


class Resources(Model):
    """Resource requests and limits of one pod, as in Kubernetes; `compute` adds the GPUs."""

    requests: dict[QualifiedName, Quantity] | None = Field(default=None, max_length=16)
    """Guaranteed resources of a pod, e.g. `{cpu: "4", memory: 16Gi}`."""
    limits: dict[QualifiedName, Quantity] | None = Field(default=None, max_length=16)
    """Maximum resources of a pod."""


class Toleration(Model):
    """A toleration of a node taint, as in Kubernetes."""

    key: QualifiedName | None = None
    """Key of the taint. Absent: every key (with operator Exists)."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """Comparison of the taint: Equal compares key and value, Exists only the key."""
    value: LabelValue | None = None
    """Value of the taint, for Equal."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Tolerated effect. Absent: every effect."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "has(self.key) || self.operator == 'Exists'",
            "a toleration without key needs operator: Exists",
            lambda t: t.key is not None or t.operator == "Exists",
            ("operator",),
        ),
    )


class Compute(Model):
    """Pods and processes of the gang that trains."""

    nodes: Annotated[int, Field(ge=1, le=1024)] = 1
    """Number of pods in the gang, one per node."""
    min_nodes: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Fewest nodes with which the gang trains (an elastic gang). If a node is lost and its pod is
    not replaced within a minute, the gang goes on with the nodes that are left, at least this many,
    from the last checkpoint; when a pod returns, the gang saves its state and starts again with it.
    The samples of each step, the global batch and the learning rate are the same at any number of
    nodes. The node of pod 0 is always needed. Absent: the gang trains with all nodes or waits."""
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] = 1
    """GPUs per pod; 0 trains on the CPU."""
    gpu_resource_name: QualifiedName = "nvidia.com/gpu"
    """Name of the cluster's GPU resource."""
    processes_per_node: Annotated[int, Field(ge=1, le=256)] | None = None
    """Training processes per pod. Absent: one per GPU, or one on the CPU."""
    sharding: Literal["Auto", "NoShard", "HybridShard", "FullShard"] = "Auto"
    """How the model is distributed over the processes. NoShard: every process holds the full model
    (DDP). HybridShard: the processes of a node share one copy (FSDP). FullShard: all processes
    share one copy (FSDP). Auto: the first of these that fits the memory of a process by the
    estimate that prepare prints, each tried without gradient checkpointing and then with it; if
    none fits, the one that needs the least memory. The result is the same, except for the rounding
    of `training.precision: BF16`."""
    gpu_memory: Quantity | None = None
    """Memory of each GPU, e.g. 80Gi. With it, prepare checks the memory estimate before a GPU is
    held: it lists alternatives that fit if the training may not fit, and refuses the training if
    weights, gradients, optimizer and anchors alone need more. Absent: the same check is made when
    the training begins. On the CPU, prepare uses `resources.limits.memory`."""
    context_parallel: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes of a node that share the tokens of each micro-batch, for samples too long for the
    memory of one process. Each process holds 1/contextParallel of the activations, and attention
    exchanges keys and values. Must divide the processes of a node. The result is the same."""
    resources: Resources = Resources()
    """CPU and memory of each pod."""
    shared_memory: Quantity = "2Gi"
    """Size of the memory-backed /dev/shm of each pod; counts towards the pod's memory."""
    termination_grace_period_seconds: Annotated[int, Field(ge=30, le=7200)] | None = None
    """Seconds that a pod of the gang has to save its state when it is stopped (drain, preemption,
    `suspend`). Absent: a minute, and twice the time to save a checkpoint, but at least 120 and at
    most 3600: as measured by earlier pods of the run (`status.checkpoints.saveSeconds`), else
    estimated from the trained parameters at 100 MiB per second and pod."""
    image: Annotated[str, StringConstraints(min_length=1, max_length=512)] | None = None
    """Trainer image of every pod of the job. Absent: the image pinned by the operator's release."""
    pod_template: dict[str, Any] | None = None
    """Partial pod template that is merged over the operator's template of the gang (maps are
    merged; named list items are merged by name): node selectors, tolerations, pull secrets, NCCL
    environment, RDMA resources. It cannot change the operator's command, labels, restart policy or
    volumes."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.minNodes) || self.minNodes <= self.nodes",
            "minNodes must not exceed nodes",
            lambda c: c.min_nodes is None or c.min_nodes <= c.nodes,
            ("minNodes", "nodes"),
        ),
        Rule(
            "!has(self.gpuMemory) || self.gpusPerNode > 0",
            "gpuMemory is for gpusPerNode above 0; on the CPU give resources.limits.memory",
            lambda c: c.gpu_memory is None or c.gpus_per_node > 0,
            ("gpuMemory", "gpusPerNode"),
        ),
        Rule(
            "!has(self.processesPerNode) || self.gpusPerNode == 0"
            " || self.processesPerNode <= self.gpusPerNode",
            "processesPerNode must not exceed gpusPerNode: each process has a GPU of its own",
            lambda c: (
                c.processes_per_node is None
                or c.gpus_per_node == 0
                or c.processes_per_node <= c.gpus_per_node
            ),
            ("processesPerNode", "gpusPerNode"),
        ),
        Rule(
            "(has(self.processesPerNode) ? self.processesPerNode"
            " : self.gpusPerNode > 0 ? self.gpusPerNode : 1) % self.contextParallel == 0",
            "contextParallel must divide the processes of a node (one per GPU if not given)",
            lambda c: c.effective_processes_per_node % c.context_parallel == 0,
            ("contextParallel", "gpusPerNode"),
        ),
    )

    @property
    def effective_min_nodes(self) -> int:
        return self.min_nodes or self.nodes

    @property
    def effective_processes_per_node(self) -> int:
        return self.processes_per_node or max(1, self.gpus_per_node)

    @property
    def process_memory(self) -> int | None:
        """Bytes of memory per process: of its GPU, or on the CPU its share of the pod's limit; None
        if not given."""
        if self.gpus_per_node > 0:
            return None if self.gpu_memory is None else bytes_of(self.gpu_memory)
        given = (self.resources.limits or {}).get("memory")
        return None if given is None else bytes_of(given) // self.effective_processes_per_node


class Prepare(Model):
    """Pods of the CPU stages (prepare and publish)."""

    workers: Annotated[int, Field(ge=1, le=256)] = 1
    """Pods that map the data in parallel, each on all its cores. The data is divided by object, and
    large plain `.jsonl` objects by byte range. Above 1, another pod reduces their results. The
    output is the same at any number of pods."""
    resources: Resources = Resources(requests={"cpu": "1", "memory": "2Gi"})
    """CPU and memory of each pod. Prepare runs one process per core of the CPU limit (without a
    limit: of the node), as far as the memory limit allows 256 MiB per process."""
    node_selector: dict[QualifiedName, LabelValue] | None = Field(default=None, max_length=32)
    """Node labels that these pods require."""
    tolerations: Annotated[list[Toleration], Field(max_length=32)] | None = None
    """Taints that these pods tolerate."""


class Scheduling(Model):
    """Scheduling of the gang."""

    queue_name: DnsLabel | None = None
    """Kueue LocalQueue of the gang's Job; Kueue then decides when the gang starts."""
    priority_class_name: DnsName | None = None
    """Priority class of the pods."""
    scheduler_name: DnsName | None = None
    """Scheduler of the gang's pods. Absent: the cluster's default."""
    disruption: Literal["Allow", "DoNotDisrupt"] = "DoNotDisrupt"
    """Whether autoscalers may move pods of the gang to save nodes. DoNotDisrupt: the pods tell the
    cluster-autoscaler (`safe-to-evict: "false"`) and Karpenter (`do-not-disrupt: "true"`) not to,
    because one moved pod stops all GPUs of the gang until it runs again. Drains, preemption and
    other evictions are not prevented. Allow: no annotation."""
    start_deadline_seconds: Count = 3600
    """Seconds that a gang may wait for its nodes, from the time its Job may start (time in a queue
    is not counted). After that the job fails, with the scheduler's reason."""


_ACTS: Final = [c for c in CLASSES if "Gang" in allowed_actions(c)]
_NEVER_WAITS: Final = [c for c in CLASSES if "Wait" not in allowed_actions(c)]


class FailureRule(Model):
    """Another action after failures of a class."""

    failure_class: FailureClass = Field(alias="class")
    """Class of the failures: see [failure classes](#failure-classes)."""
    reason: CamelWord | None = None
    """Only failures of the class with this reason. Absent: all of the class."""
    action: Literal["Gang", "Elsewhere", "Wait", "End"]
    """Gang: all pods of the gang are recreated, and continue from the last checkpoint; a failure
    that would end the run counts as a fault. Elsewhere: as Gang, and the pods avoid the node of the
    failed pod for 4 hours. Wait: the gang gives its nodes back and tries again after a minute, then
    twice as late each time up to 8 minutes, until `scheduling.startDeadlineSeconds` are over
    without a new checkpoint; no fault is counted. For pods that cannot start it extends the time
    that is waited to `scheduling.startDeadlineSeconds`. End: the run ends at the first failure."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            f"!(self.class in {json.dumps(_NEVER_WAITS)}) || self.action == 'End'",
            f"failures of class {' and '.join(_NEVER_WAITS)} can only End the run: the same"
            " manifest and data would fail again",
            lambda r: r.failure_class not in _NEVER_WAITS or r.action == "End",
            ("class", "action"),
        ),
        Rule(
            f"self.class in {json.dumps(_ACTS)} || self.action in ['Wait', 'End']",
            "failures of pods that cannot start can only Wait or End the run: they run on no node",
            lambda r: r.failure_class in _ACTS or r.action in ("Wait", "End"),
            ("class", "action"),
        ),
        Rule(
            "!has(self.reason) || (self.class + ' ' + self.reason) in"
            f" {json.dumps([f'{row.failure_class} {reason}' for reason, row in ROWS.items()])}",
            "reason must be one of the class, as in the table of failures of the reference",
            lambda r: (
                r.reason is None
                or (r.reason in ROWS and ROWS[r.reason].failure_class == r.failure_class)
            ),
            ("class", "reason"),
        ),
    )


class FailurePolicy(Model):
    """What is done after failures, and how often."""

    max_restarts: Annotated[int, Field(ge=0, le=1000)] = 3
    """Restarts of the gang after faults before the job fails. A fault (a crash, a memory limit, a
    storage outage) counts once, however many pods it affects. Disruptions by Kubernetes (drain,
    preemption, a lost node) do not count. Half an hour of training without a fault, with a new
    checkpoint, restores the whole number. A failed run continues by spec.retryToken."""
    progress_deadline_seconds: Annotated[int, Field(ge=60, le=86_400)] | None = None
    """Seconds without any progress of a training process (a micro-batch, a batch of an evaluation,
    a part of the weights or of a checkpoint) after which the gang is started again in place, and,
    if it stalls again, its pod is replaced. Absent: 900, or 20 times the longest time without a
    sign of progress so far, if longer; 3600 before the first step."""
    rules: Annotated[list[FailureRule], Field(max_length=16)] = []
    """Other actions than those in the [table of failures](#failures). The first rule that matches a
    failure decides. Retries are bounded by `maxRestarts` (Gang, Elsewhere) or by
    `scheduling.startDeadlineSeconds` (Wait)."""
