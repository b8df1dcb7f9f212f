"""Blocks of the spec that say what runs where: the gang, the CPU stages, scheduling, restarts."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import Field, StringConstraints

from finetune_api.base import (
    Count,
    DnsLabel,
    DnsName,
    Model,
    Rule,
    Spelling,
)

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
    """The number that a quantity of Kubernetes means, rounded down: ``16Gi`` is 17179869184."""
    if "e" in quantity:
        return int(Fraction(quantity))
    number = quantity.rstrip("".join(_SUFFIXES))
    return int(Fraction(number) * _SUFFIXES[quantity[len(number) :]])


QualifiedName = Annotated[str, StringConstraints(min_length=1, max_length=317)]
LabelValue = Annotated[str, StringConstraints(max_length=63)]


class Resources(Model):
    """Resource requests and limits of one pod, as in Kubernetes; GPUs are added by `compute`."""

    requests: dict[QualifiedName, Quantity] | None = Field(default=None, max_length=16)
    """What a pod is guaranteed, e.g. `{cpu: "4", memory: 16Gi}`."""
    limits: dict[QualifiedName, Quantity] | None = Field(default=None, max_length=16)
    """What a pod may use at most."""


class Toleration(Model):
    """A taint that pods may be scheduled onto, as in Kubernetes."""

    key: QualifiedName | None = None
    """Key of the taint. Absent: every key (with operator Exists)."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """How the value is compared."""
    value: LabelValue | None = None
    """Value of the taint, for Equal."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect that is tolerated. Absent: every effect."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "has(self.key) || self.operator == 'Exists'",
            "a toleration without key needs operator: Exists",
            lambda t: t.key is not None or t.operator == "Exists",
            ("operator",),
        ),
    )


class Compute(Model):
    """The gang that trains."""

    nodes: Annotated[int, Field(ge=1, le=1024)] = 1
    """Pods of the gang, one per node."""
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] = 1
    """GPUs of each pod; 0 trains on the CPU."""
    gpu_resource_name: QualifiedName = "nvidia.com/gpu"
    """Name of the GPU resource of the cluster."""
    processes_per_node: Annotated[int, Field(ge=1, le=256)] | None = None
    """Training processes of each pod. Absent: one per GPU, or one on the CPU."""
    sharding: Literal["Auto", "NoShard", "HybridShard", "FullShard"] = "Auto"
    """How the model lies on the processes. NoShard: whole on each (DDP). HybridShard: the processes
    of a node share one copy. FullShard: all share one (both FSDP). Auto: the first of them in which
    the training fits the memory of a process, by the estimate that prepare prints, each without
    gradient checkpointing and then with it; where it fits in none, what takes least. The result is
    the same, but for what `training.precision: BF16` rounds."""
    gpu_memory: Quantity | None = None
    """Memory of each GPU, e.g. 80Gi: before a GPU is held, prepare then says what would fit where
    the training may not, and refuses it where weights, gradients, optimizer and anchors alone take
    more. Absent: known when the training begins, which does the same then. On the CPU, prepare goes
    by `resources.limits.memory`."""
    context_parallel: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes of a node that share the tokens of each row, for samples that are too long for the
    memory of one: each holds this fraction of the activations, and attention exchanges keys and
    values. It must divide the processes of a node. The result is the same."""
    resources: Resources = Resources()
    """CPU and memory of each pod."""
    shared_memory: Quantity = "2Gi"
    """Size of the memory-backed /dev/shm of each pod; it counts as memory of the pod."""
    image: Annotated[str, StringConstraints(min_length=1, max_length=512)] | None = None
    """Trainer image of every pod of the job. Absent: the one that the operator's release pins."""
    pod_template: dict[str, Any] | None = None
    """Parts of a pod template laid over what the operator makes for the gang (maps are merged,
    named list items are merged by name): node selectors, tolerations, pull secrets, NCCL
    environment, RDMA resources. It cannot change the command, the labels, the restart policy or
    the volumes of the operator."""

    RULES: ClassVar[tuple[Rule, ...]] = (
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
    def effective_processes_per_node(self) -> int:
        return self.processes_per_node or max(1, self.gpus_per_node)

    @property
    def process_memory(self) -> int | None:
        """Bytes of memory of a process, of its GPU or of its share of the pod, where they are
        given."""
        if self.gpus_per_node > 0:
            return None if self.gpu_memory is None else bytes_of(self.gpu_memory)
        given = (self.resources.limits or {}).get("memory")
        return None if given is None else bytes_of(given) // self.effective_processes_per_node


class Prepare(Model):
    """Pods of the CPU stages (prepare and publish)."""

    workers: Annotated[int, Field(ge=1, le=256)] = 1
    """Pods that map the data, each a share of it on all its cores: by objects, and by ranges of
    large plain `.jsonl` objects. Above 1 another pod reduces what they leave. What they write is
    the same at any number of them."""
    resources: Resources = Resources()
    """CPU and memory of each pod. Prepare runs a process for each core of the CPU limit (without
    one, of the node), as far as the memory limit has 256 MiB for each."""
    node_selector: dict[QualifiedName, LabelValue] | None = Field(default=None, max_length=32)
    """Labels that a node of these pods must have."""
    tolerations: Annotated[list[Toleration], Field(max_length=32)] | None = None
    """Taints that these pods tolerate."""


class Scheduling(Model):
    """How the gang gets its nodes."""

    queue_name: DnsLabel | None = None
    """Kueue LocalQueue of the gang's Job; Kueue then decides when it starts."""
    priority_class_name: DnsName | None = None
    """Priority class of the pods."""
    scheduler_name: DnsName | None = None
    """Scheduler of the gang's pods. Absent: the cluster's default."""
    start_deadline_seconds: Count = 3600
    """Seconds that a gang may wait for its nodes, from the time its Job may start (time in a queue
    is not counted); the job fails after it, with the scheduler's reason."""


class FailurePolicy(Model):
    """What is done about failures that a new try can mend."""

    max_restarts: Annotated[int, Field(ge=0, le=1000)] = 3
    """Incidents of the gang (a lost node, a killed process), not pods, after which the job
    fails. A higher number does not wake a run that has failed."""
