"""``spec`` of a FineTuneJob: what a user asks for.

Field docstrings are the text of the CRD and of ``docs/reference.md``; defaults stand here and
nowhere else. Where a good default depends on other fields (the learning rate of LoRA is not that
of full tuning) the field is optional and ``effective_*`` on the block gives the value used.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints, ValidationError

from finetune_api.base import (
    Count,
    DecimalString,
    DnsLabel,
    DnsName,
    FieldName,
    Fraction,
    InvalidSpec,
    Model,
    Rule,
    S3Uri,
    Spelling,
    Text,
    explain,
)

Format = Literal["Messages", "PromptCompletion", "Instruction", "Classification", "Text"]
Metric = Literal[
    "Loss", "Perplexity", "ExactMatch", "Accuracy", "Precision", "Recall", "F1", "Bleu", "Rouge"
]

# On a cluster a source is remote or a mounted claim; `finetune run` also takes paths of its own
# machine, which it serves as s3:// before the spec is validated (one schema for both).
ModelUri = Annotated[
    str,
    Spelling(
        r"^(s3|hf|pvc)://[a-zA-Z0-9][^?#\x00-\x20]*$",
        "s3://bucket/prefix, hf://organisation/name@revision or pvc://claim/path",
        max_length=1024,
    ),
]
DataUri = Annotated[
    str,
    Spelling(
        r"^(s3|pvc)://[a-z0-9][^?#\x00-\x20]*$",
        "s3://bucket/prefix/*.jsonl or pvc://claim/path",
        max_length=1024,
    ),
]
Quantity = Annotated[
    str,
    Spelling(
        r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti|P|Pi|E|Ei|e[0-9]+)?$",
        'a quantity of Kubernetes: 4, "500m", 16Gi',
        max_length=32,
        or_integer=True,
    ),
]
QualifiedName = Annotated[str, StringConstraints(min_length=1, max_length=317)]
LabelValue = Annotated[str, StringConstraints(max_length=63)]


class SecretReference(Model):
    """A Secret of the job's namespace."""

    name: DnsName
    """Name of the Secret. Read keys: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, and, where they
    exist, AWS_SESSION_TOKEN and HF_TOKEN. Pods get them by reference; the operator never reads
    them."""


class StorageAccess(Model):
    """How one place of object storage is reached."""

    endpoint: (
        Annotated[
            str,
            Spelling(
                r"^https?://[^/?#\x00-\x20]+/?$",
                "the URL of a server, without a path: https://s3.example.com",
                max_length=512,
            ),
        ]
        | None
    ) = None
    """URL of an S3-compatible server. Absent: Amazon S3 of the region."""
    region: Annotated[
        str, Spelling(r"^[a-z0-9-]+$", "the name of a region: us-east-1", max_length=64)
    ] = "us-east-1"
    """Region that requests are signed for."""
    secret_ref: SecretReference | None = None
    """Secret that holds the access keys. Absent: the pod's own identity (a service account bound
    to a role), or anonymous access."""


class Storage(StorageAccess):
    """Object storage of the job, and where its working files live."""

    service_account_name: DnsName | None = None
    """Service account of the job's pods, for storage access by workload identity."""
    workspace: S3Uri | None = None
    """Where prepared data and checkpoints are kept. Jobs that share a workspace share prepared
    data. Absent: `.workspace` under the output's destination."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!(has(self.secretRef) && has(self.serviceAccountName))",
            "secretRef and serviceAccountName exclude each other: give one of them",
            lambda s: not (s.secret_ref and s.service_account_name),
            ("secretRef.name", "serviceAccountName"),
        ),
    )


class BaseModelSource(Model):
    """The model to start from."""

    source: ModelUri
    """`s3://bucket/prefix` of a model folder in Hugging Face layout (config.json, safetensors,
    tokenizer), `hf://organisation/name@revision` of the Hugging Face hub, or `pvc://claim/path`
    of a volume claim in the job's namespace."""
    storage: StorageAccess | None = None
    """Access to this source where it differs from `spec.storage`."""


class Template(Model):
    """How a record becomes a prompt and the completion that is learned (Jinja)."""

    prompt: Text
    """The part that is read, e.g. `"Review: {{ sentence }}\\nSentiment:"`. Fields of the record
    are variables."""
    completion: Text
    """The part that is learned, e.g. `" {{ label }}"`. The end-of-sequence token follows it."""


class DataSource(Model):
    """One set of labelled records."""

    name: DnsLabel | None = None
    """Name in metrics and reports. Absent: the list's name and the position, e.g. `train-0`."""
    source: DataUri
    """`s3://bucket/prefix/*.jsonl` or `pvc://claim/path`: an object, a glob, or a prefix ending in
    '/'. JSON Lines (`.jsonl`, `.json`, also `.gz`) and Parquet (`.parquet`)."""
    format: Format | None = None
    """What the records hold. Messages: `messages` of role and content. PromptCompletion: `prompt`,
    `completion`. Instruction: `instruction`, `input` (optional), `output`. Classification: `text`,
    `label`. Text: `text`, all of it learned. Absent: found out from the first record."""
    template: Template | None = None
    """Renders records whose fields have other names. Not for Messages and Text."""
    storage: StorageAccess | None = None
    """Access to this source where it differs from `spec.storage`."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.template) || !has(self.format) || !(self.format in ['Messages', 'Text'])",
            "template does not go with format Messages or Text: leave one of them out",
            lambda s: s.template is None or s.format not in ("Messages", "Text"),
            ("format",),
        ),
    )


class Split(Model):
    """Held-out shares, cut from the training records where no set of their own is given."""

    validation: Fraction = "0.05"
    """Share of the training records held out for validation. No effect where `data.validation` is
    given."""
    test: Fraction = "0.05"
    """Share of the training records held out for the final test. No effect where `data.test` is
    given."""
    group_by: FieldName | None = None
    """Field whose equal values stay on one side of the split. Absent: records with equal prompts
    stay together, so that no test prompt was trained on."""
    seed: Annotated[int, Field(ge=0, le=2_147_483_647)] = 0
    """Seed of the split. A record's side depends on its group and this seed alone, so it keeps its
    side as the data grows."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "[self.validation, self.test].exists(share, !share.matches('^[0-9.]+$'))"
            " || double(self.validation) + double(self.test) < 1.0",
            "validation and test together must be below 1: something must be left to train on",
            lambda s: float(s.validation) + float(s.test) < 1.0,
            ("validation", "test"),
        ),
    )


class Quality(Model):
    """What is done about faults of the data."""

    deduplicate: bool = True
    """Drop records of the training set whose prompt and completion occurred before."""
    overlength: Literal["Truncate", "Drop", "Fail"] = "Truncate"
    """What happens to a sample of more than `training.maxLength` tokens. Truncate cuts the
    beginning of the prompt (the completion is kept), Drop leaves the sample out, Fail ends the job.
    The data report counts them."""


def _names_differ(field: str) -> Rule:
    def holds(data: Data) -> bool:
        names = [s.name for s in getattr(data, field) or [] if s.name is not None]
        return len(names) == len(set(names))

    return Rule(
        f"!has(self.{field}) || self.{field}.all(a, !has(a.name) ||"
        f" self.{field}.filter(b, has(b.name) && b.name == a.name).size() == 1)",
        f"names in {field} must differ: each set has its own metrics",
        holds,
        (f"{field}[].name",),
    )


class Data(Model):
    """What is learned from, and what is measured on."""

    train: Annotated[list[DataSource], Field(min_length=1, max_length=64)]
    """Training sets; several are mixed in proportion to their size."""
    validation: Annotated[list[DataSource], Field(min_length=1, max_length=16)] | None = None
    """Sets measured on the way: they choose the checkpoint and stop early."""
    test: Annotated[list[DataSource], Field(min_length=1, max_length=16)] | None = None
    """Sets measured at the end, for the untuned and the tuned model."""
    split: Split = Split()
    """Shares held out of the training records where validation or test sets are not given."""
    quality: Quality = Quality()
    """What is done about faults of the data."""

    RULES: ClassVar[tuple[Rule, ...]] = tuple(
        _names_differ(field) for field in ("train", "validation", "test")
    )


class Lora(Model):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685)."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank of the update matrices."""
    alpha: Annotated[int, Field(ge=1, le=8192)] | None = None
    """Scale of the update: alpha / rank. Absent: twice the rank."""
    dropout: Fraction = "0"
    """Probability that an input of an adapter is dropped."""
    target_modules: (
        Annotated[
            list[Annotated[str, StringConstraints(min_length=1, max_length=256)]],
            Field(min_length=1, max_length=64),
        ]
        | None
    ) = None
    """Names (or name endings) of the modules that get an adapter. Absent: every linear layer but
    the output head."""

    @property
    def effective_alpha(self) -> int:
        return self.alpha if self.alpha is not None else 2 * self.rank


class Method(Model):
    """Which weights are trained."""

    type: Literal["Full", "LoRA"] = "LoRA"
    """Full: every weight. LoRA: small matrices beside the linear layers, the rest frozen."""
    lora: Lora | None = None
    """Settings of LoRA; absent, its defaults."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.lora) || self.type == 'LoRA'",
            "lora goes with type LoRA only: remove it, or set type: LoRA",
            lambda m: m.lora is None or m.type == "LoRA",
            ("type",),
        ),
    )

    @property
    def effective_lora(self) -> Lora:
        return self.lora or Lora()


class EarlyStopping(Model):
    """Ends the training when validation no longer improves."""

    metric: Metric = "Loss"
    """Validation metric that is watched."""
    patience: Annotated[int, Field(ge=1, le=1000)] = 3
    """Evaluations without improvement after which training ends."""
    min_delta: DecimalString = "0"
    """Least change that counts as improvement, in units of the metric."""


class Training(Model):
    """How the weights are trained."""

    epochs: Annotated[int, Field(ge=1, le=10000)] | None = None
    """Passes over the training set. Absent, with maxSteps absent too: 3."""
    max_steps: Count | None = None
    """Optimizer steps, instead of epochs."""
    max_length: Annotated[int, Field(ge=8, le=1_048_576)] | None = None
    """Longest sample, in tokens. Absent: the model's maximum, but at most 2,048."""
    batch_size: Annotated[int, Field(ge=1, le=1_048_576)] = 32
    """Samples per optimizer step over all processes; the same at any number of them."""
    micro_batch_tokens: Annotated[int, Field(ge=8, le=16_777_216)] | None = None
    """Most tokens that one process runs through the model at once. Absent: maxLength, but at least
    2,048. Affects memory and speed, not the result."""
    learning_rate: DecimalString | None = None
    """Peak learning rate. Absent: "2e-4" for LoRA, "2e-5" for Full."""
    schedule: Literal["Cosine", "Linear", "Constant"] = "Cosine"
    """Course of the learning rate after the warm-up: to zero by a half cosine, to zero by a line,
    or constant."""
    warmup_ratio: Fraction = "0.03"
    """Share of the steps in which the learning rate rises linearly from zero."""
    weight_decay: DecimalString = "0"
    """Decoupled weight decay of AdamW; not applied to norms and biases."""
    dropout: Fraction = "0"
    """Probability with which outputs of attention and feed-forward blocks are dropped."""
    max_grad_norm: DecimalString = "1.0"
    """Largest norm of the gradient; a larger one is scaled down. "0" switches clipping off."""
    precision: Literal["Auto", "BF16", "FP32"] = "Auto"
    """Arithmetic of the model: BF16 is bfloat16 autocast over 32-bit weights. Auto: BF16 on a GPU,
    FP32 on a CPU."""
    gradient_checkpointing: bool = False
    """Keep fewer activations and compute them again on the way back: less memory, about a third
    more time."""
    seed: Annotated[int, Field(ge=0, le=2_147_483_647)] = 42
    """Seed of the order of the samples, of dropout and of new weights."""
    early_stopping: EarlyStopping | None = None
    """Ends the training when validation no longer improves. Absent: trains to the end."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!(has(self.epochs) && has(self.maxSteps))",
            "epochs and maxSteps exclude each other: give one of them",
            lambda t: t.epochs is None or t.max_steps is None,
            ("epochs", "maxSteps"),
        ),
    )


class Evaluation(Model):
    """What is measured, and when."""

    every_steps: Count | None = None
    """Steps between evaluations on the validation sets. Absent: ten times over the run."""
    metrics: Annotated[list[Metric], Field(min_length=1, max_length=16)] | None = None
    """What the final test reports. Absent: Loss and Perplexity, and Accuracy, Precision, Recall
    and F1 for Classification, ExactMatch, Bleu and Rouge for other prompts with completions."""
    max_samples: Count = 1000
    """Most samples of a set for which text is generated; loss is always over the whole set."""
    max_new_tokens: Annotated[int, Field(ge=1, le=65536)] | None = None
    """Longest generated answer, in tokens. Absent: the longest completion of the training set,
    but at most 512."""


class Checkpoint(Model):
    """When the training state is committed to object storage."""

    every_steps: Count | None = None
    """Steps between commits."""
    every_seconds: Count | None = None
    """Seconds between commits. Absent, with everySteps absent too: 600."""
    keep_last: Annotated[int, Field(ge=1, le=100)] = 2
    """Commits kept beside the best one; older ones are removed."""
    metric: Metric = "Loss"
    """Validation metric by which the best commit is chosen; that one is published."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!(has(self.everySteps) && has(self.everySeconds))",
            "everySteps and everySeconds exclude each other: give one of them",
            lambda c: c.every_steps is None or c.every_seconds is None,
            ("everySteps", "everySeconds"),
        ),
    )


class Output(Model):
    """Where the tuned model goes."""

    destination: S3Uri
    """The model of run N is written to `<destination>/<run>/`; `latest.json` beside names the
    newest complete one."""
    format: Literal["Adapter", "Merged", "Both"] | None = None
    """Adapter: the LoRA adapter alone. Merged: a whole model. Absent: Adapter for LoRA, Merged
    for Full."""


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
    )

    @property
    def effective_processes_per_node(self) -> int:
        return self.processes_per_node or max(1, self.gpus_per_node)


class Prepare(Model):
    """Pods of the CPU stages (prepare and publish)."""

    resources: Resources = Resources()
    """CPU and memory of each pod."""
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
    fails."""


class FineTuneJobSpec(Model):
    """What a user asks for: a model, data, how to train, and where the result goes."""

    model: BaseModelSource
    """The model to start from."""
    data: Data
    """What is learned from, and what is measured on."""
    method: Method = Method()
    """Which weights are trained."""
    training: Training = Training()
    """How the weights are trained."""
    evaluation: Evaluation = Evaluation()
    """What is measured, and when."""
    checkpoint: Checkpoint = Checkpoint()
    """When the training state is committed to object storage."""
    output: Output
    """Where the tuned model goes."""
    compute: Compute = Compute()
    """The gang that trains."""
    prepare: Prepare = Prepare()
    """Pods of the CPU stages (prepare and publish)."""
    scheduling: Scheduling = Scheduling()
    """How the gang gets its nodes."""
    failure_policy: FailurePolicy = FailurePolicy()
    """What is done about failures that a new try can mend."""
    storage: Storage = Storage()
    """Object storage of the job, and where its working files live."""
    suspend: bool = False
    """Save, stop and hold no node until it is false again."""
    rerun_token: Annotated[str, StringConstraints(max_length=128)] | None = None
    """Any new string starts a new run: for data that changed behind its address."""
    children_ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=2_147_483_647)] | None = (
        Field(default=None, alias="childrenTTLSecondsAfterFinished")
    )
    """Seconds after which Jobs, pods and Services of a finished run are removed. The FineTuneJob
    and all that is in object storage stay. Absent: they stay until the FineTuneJob is deleted."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.output.format) || self.output.format == 'Merged'"
            " || self.method.type == 'LoRA'",
            "output.format Adapter and Both need method.type LoRA: Full has no adapter",
            lambda s: s.output.format in (None, "Merged") or s.method.type == "LoRA",
            ("output.format", "method.type"),
        ),
        Rule(
            "!has(self.training.earlyStopping) || has(self.data.validation)"
            " || !self.data.split.validation.matches('^[0.]+$')",
            "training.earlyStopping needs a validation set: give data.validation or a"
            " data.split.validation above 0",
            lambda s: (
                s.training.early_stopping is None
                or s.data.validation is not None
                or float(s.data.split.validation) > 0
            ),
            ("data.split.validation",),
        ),
    )

    @property
    def effective_learning_rate(self) -> float:
        if self.training.learning_rate is not None:
            return float(self.training.learning_rate)
        return 2e-4 if self.method.type == "LoRA" else 2e-5

    @property
    def effective_epochs(self) -> int | None:
        """Passes over the data, or None where ``training.maxSteps`` decides."""
        return None if self.training.max_steps is not None else self.training.epochs or 3

    @property
    def effective_output_format(self) -> Literal["Adapter", "Merged", "Both"]:
        return self.output.format or ("Adapter" if self.method.type == "LoRA" else "Merged")

    @property
    def effective_workspace(self) -> str:
        return (
            self.storage.workspace or f"{self.output.destination.rstrip('/')}/.workspace"
        ).rstrip("/")


def parse_spec(raw: Any) -> FineTuneJobSpec:
    """The validated spec of a manifest's ``spec`` mapping.

    Raises:
        InvalidSpec: with one line per fault, each with its path.
    """
    try:
        return FineTuneJobSpec.model_validate(raw)
    except ValidationError as error:
        raise InvalidSpec(explain(error)) from None
